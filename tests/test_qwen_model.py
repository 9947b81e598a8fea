"""The decoder is the equations: logits and every named place, against NumPy in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import qwen_eqx
import strategies
import tiny
import tolerances
from qwen_eqx import PRESETS, InputError, Qwen, QwenConfig, Site
from qwen_eqx.model.sites import KINDS, OUTER_SITES

SHAPES = {
    "group 7": QwenConfig("qwen2", 31, 20, 2, 14, 2, 4, 28, 64, tied=True),
    "group 1": QwenConfig("qwen2", 31, 12, 2, 3, 3, 4, 20, 64, tied=False),
    "group 2, d_head is not d_model / heads": QwenConfig("qwen3", 31, 12, 2, 4, 2, 10, 20, 64, tied=False),
    "qwen3, tied": QwenConfig("qwen3", 31, 16, 2, 4, 4, 2, 20, 64, tied=True),
}


def every_site(config: QwenConfig) -> list[Site]:
    return [*OUTER_SITES, *(Site(layer, kind) for layer in range(config.layers) for kind in KINDS)]


def check_against_oracle(model: Qwen, tokens: list[int]):
    """Logits, and every site under its TransformerLens name."""
    names = tuple(str(site) for site in every_site(model.config))
    logits, acts = eqx.filter_jit(model.run_with_capture)(jnp.asarray(tokens), names)
    expected, places = oracles.decoder(model, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, **tolerances.LOGITS_F32)
    assert set(acts) == set(names)
    for site in every_site(model.config):
        found = acts[str(site)]
        assert found.shape == site.shape(model.config, len(tokens))
        np.testing.assert_allclose(found, places[site.layer, site.kind], err_msg=str(site), **tolerances.LOGITS_F32)


@given(config=strategies.configs(min_d_model=4), seed=st.integers(0, 2**32 - 1), seq=st.sampled_from([1, 2, 7, 13]))
@settings(max_examples=12)
def test_random_decoders_are_the_equations(config: QwenConfig, seed: int, seq: int):
    tokens = np.random.default_rng(seed).integers(0, config.vocab, seq).tolist()
    check_against_oracle(tiny.random_model(config, seed), tokens)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_that_matter_are_the_equations(name: str):
    check_against_oracle(tiny.random_model(SHAPES[name]), np.random.default_rng(0).integers(0, 31, 33).tolist())


def hugging_face_names(config: QwenConfig) -> dict[str, str]:
    """Hugging Face's spelling -> TransformerLens', for the modules that put out what a site holds."""
    modules = {
        "": "hook_resid_post", ".self_attn": "hook_attn_out", ".mlp": "hook_mlp_out",
        ".self_attn.q_proj": "attn.hook_q", ".self_attn.k_proj": "attn.hook_k", ".self_attn.v_proj": "attn.hook_v",
    }  # fmt: skip
    return {
        f"model.layers.{layer}{module}": f"blocks.{layer}.{tl}"
        for layer in range(config.layers)
        for module, tl in modules.items()
    }


def test_both_spellings_name_one_place():
    model = tiny.model("qwen3")
    names = hugging_face_names(model.config)
    _, acts = eqx.filter_jit(model.run_with_capture)(jnp.arange(5), (*names, *names.values()))
    for hf, tl in names.items():
        np.testing.assert_array_equal(acts[hf], acts[tl], err_msg=hf)


def test_capture_changes_no_logit_and_a_batch_is_its_rows():
    model = tiny.model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 9)))
    batch = eqx.filter_jit(lambda model, tokens: jax.vmap(model)(tokens))(model, tokens)
    captured = eqx.filter_jit(model.run_with_capture)
    for row in range(3):
        alone, acts = captured(tokens[row], ("blocks.1.hook_resid_mid",))
        assert acts["blocks.1.hook_resid_mid"].shape == (9, 16)
        np.testing.assert_allclose(alone, batch[row], **tolerances.SAME_F32)


@given(tokens=strategies.token_ids(97, 8, 8), at=st.integers(0, 7), other=st.integers(0, 96))
@settings(max_examples=10)
def test_no_position_sees_a_later_one(tokens: list[int], at: int, other: int):
    changed = [*tokens[:at], other, *tokens[at + 1 :]]
    logits = forward(tokens), forward(changed)
    np.testing.assert_array_equal(logits[0][:at], logits[1][:at])


@eqx.filter_jit
def _forward(model: Qwen, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def forward(tokens: list[int]) -> np.ndarray:
    return np.asarray(_forward(tiny.model(), jnp.asarray(tokens)))


def test_bfloat16_stays_near_the_equations():
    """Weights rounded the same way on both sides: what is left is bf16's rounding of the activations between."""
    model = tiny.model(dtype="bfloat16")
    tokens = np.random.default_rng(1).integers(0, 97, 9).tolist()
    logits, acts = eqx.filter_jit(model.run_with_capture)(jnp.asarray(tokens), ("model.layers.1",))
    assert (logits.dtype, acts["model.layers.1"].dtype) == (jnp.float32, jnp.bfloat16)
    expected, places = oracles.decoder(model, tokens)
    for found, exact in ((logits, expected), (acts["model.layers.1"], places[1, "resid_post"])):
        errors = np.linalg.norm(np.asarray(found, np.float64) - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        assert errors.max() < tolerances.BF16_ROW


PARAMETERS = {  # as the weight files on the hub add up to
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_build_in_no_memory(name: str):
    config = PRESETS[name]
    model = eqx.filter_eval_shape(Qwen.init, config, key=jax.random.key(0))
    leaves = jax.tree.leaves(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == config.parameters == PARAMETERS[name]


def test_a_published_size_runs_in_no_memory():
    config = PRESETS["Qwen2.5-0.5B"]
    model = eqx.filter_eval_shape(Qwen.init, config, key=jax.random.key(0))
    sites = [*OUTER_SITES, *(Site(config.layers - 1, kind) for kind in KINDS)]
    logits, acts = eqx.filter_eval_shape(
        lambda m, tokens: m.run_with_capture(tokens, [str(site) for site in sites]),
        model,
        jax.ShapeDtypeStruct((5,), jnp.int32),
    )
    assert (logits.shape, logits.dtype) == ((5, config.vocab), jnp.float32)
    assert {name: value.shape for name, value in acts.items()} == {str(site): site.shape(config, 5) for site in sites}


def test_random_weights_differ_and_start_as_transformers_starts_them():
    model = Qwen.init(tiny.CONFIGS["qwen2"], key=jax.random.key(0), dtype=jnp.float32)
    assert float(jnp.std(model.embed.table)) == pytest.approx(0.02, rel=0.1)
    tables = [model.embed.table, model.head.weight, model.blocks[0].attn.q.weight, model.blocks[1].attn.q.weight]
    assert len({np.asarray(table).tobytes()[:64] for table in tables}) == len(tables)
    assert all((np.asarray(norm) == 1).all() for norm in (model.norm.weight, model.blocks[1].mlp_norm.weight))
    assert all((np.asarray(block.attn.k.bias) == 0).all() for block in model.blocks)


@pytest.mark.parametrize(
    "name", ["blocks.2.hook_resid_post", "blocks.0.hook_nothing", "model.layers.0.norm", "", "x\ny"]
)
def test_an_unknown_site_says_which_exist(name: str):
    with pytest.raises(InputError) as caught:
        tiny.model().run_with_capture(jnp.arange(3), [name])
    assert repr(name) in str(caught.value)
    for part in (
        "blocks.0 … blocks.1",
        "hook_resid_mid",
        "attn.hook_q",
        "mlp.hook_post",
        "model.layers.1",
        "self_attn",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_public_names_are_there():
    assert qwen_eqx.Qwen is Qwen
    assert isinstance(tiny.model().config, QwenConfig)
