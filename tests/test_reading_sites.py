"""Norm scales, MLP inputs, heads' results, embeddings and the final norm are read and edited as the equations say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import qwen_eqx
import tiny
import tolerances
from qwen_eqx import Ablate, InputError, Patch, Steer

TOKENS = [5, 9, 1, 46, 0, 3, 3]
RNG = np.random.default_rng(0)
BATCH = [[5, 9, 1], [7], list(range(20))]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_edits_of_every_new_kind_are_the_equations(name: str):
    model = tiny.model(name)
    width, ends = model.config.d_model, np.asarray([1, 6])
    scales, push = RNG.uniform(1, 2, (2, 1)), RNG.normal(size=(4, width))

    def by_hand(layer: int, kind: str, x: np.ndarray) -> np.ndarray:
        x = x.copy()
        if (layer, kind) == (1, "ln1_scale"):
            x[ends] = scales
        elif (layer, kind) in ((0, "embed"), (0, "mlp_in"), (1, "ln2_normalized"), (0, "final_normalized")):
            x += push[["embed", "mlp_in", "ln2_normalized", "final_normalized"].index(kind)]
        elif (layer, kind) == (0, "result"):
            x[:, width : 2 * width] = 0
        return x

    steers = {
        "hook_embed": 0,
        "blocks.0.mlp.hook_in": 1,
        "blocks.1.ln2.hook_normalized": 2,
        "ln_final.hook_normalized": 3,
    }
    edits = [
        Patch(jnp.asarray(scales, jnp.float32), ends, site="blocks.1.ln1.hook_scale"),
        Ablate(site="blocks.0.attn.hook_result", head=1),
        *(Steer(jnp.asarray(push[row], jnp.float32), site=site) for site, row in steers.items()),
    ]
    logits, acts = model.run_with_capture(TOKENS, ["ln_final.hook_scale", "model.layers.1"], edits=edits)
    expected, places = oracles.decoder(model, TOKENS, by_hand)
    np.testing.assert_allclose(logits, expected, **tolerances.LOGITS_F32)
    np.testing.assert_allclose(acts["ln_final.hook_scale"], places[0, "final_scale"], **tolerances.LOGITS_F32)
    np.testing.assert_allclose(acts["model.layers.1"], places[1, "resid_post"], **tolerances.LOGITS_F32)


def test_patterns_and_final_norms_of_a_batch_are_its_rows_and_zeros():
    names = ["blocks.1.attn.hook_pattern", "ln_final.hook_scale"]
    last, acts = tiny.model().run_with_capture(BATCH, names, logits="last")
    patterns = np.asarray(acts[names[0]])
    assert patterns.shape == (3, 4, 20, 20)
    for row, tokens in enumerate(BATCH):
        logits, alone = tiny.model().run_with_capture(tokens, names)
        assert alone[names[0]].shape == (4, len(tokens), len(tokens))
        np.testing.assert_allclose(last[row], logits[-1], **tolerances.SAME_F32)
        for name, value in alone.items():
            here = (slice(None), slice(len(tokens)), slice(len(tokens))) if "pattern" in name else slice(len(tokens))
            np.testing.assert_allclose(acts[name][row][here], value, **tolerances.SAME_F32)
        assert not patterns[row, :, len(tokens) :].any()
        np.testing.assert_allclose(patterns[row, :, : len(tokens)].sum(axis=-1), 1, **tolerances.SAME_F32)


def test_in_bfloat16_scales_and_patterns_stay_float32_and_asking_changes_nothing():
    model = tiny.model(dtype="bfloat16")
    names = ["blocks.0.ln1.hook_scale", "blocks.0.mlp.hook_in", "blocks.0.attn.hook_result", "ln_final.hook_scale"]
    plain, _ = model.run_with_capture(TOKENS, [])
    logits, acts = model.run_with_capture(TOKENS, names)
    assert [acts[name].dtype for name in names] == [jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32]
    np.testing.assert_array_equal(logits, plain)
    same = Patch(acts[names[1]], np.arange(len(TOKENS)), site=names[1])
    np.testing.assert_array_equal(model.run_with_capture(TOKENS, [], edits=[same])[0], plain)


def test_results_sum_to_what_attention_adds_and_generation_edits_them():
    site = "blocks.1.attn.hook_result"
    model = tiny.model()
    _, acts = model.run_with_capture(TOKENS, [site, "blocks.1.hook_attn_out"])
    each = acts[site].reshape(len(TOKENS), model.config.heads, -1)
    np.testing.assert_allclose(each.sum(axis=1), acts["blocks.1.hook_attn_out"], **tolerances.SAME_F32)
    without = [Ablate(site=site, head=2)]
    found = qwen_eqx.generate(model, [TOKENS], max_new_tokens=1, edits=without)
    logits, _ = model.run_with_capture(TOKENS, [], edits=without, logits="last")
    np.testing.assert_allclose(found.log_probs[0, 0], jax.nn.log_softmax(logits).max(), **tolerances.LOGITS_F32)


def test_what_cannot_be_edited_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"edits\[0\].*hook_pattern.*read only"):
        tiny.model().run_with_capture(TOKENS, [], edits=[Ablate(site="blocks.0.attn.hook_pattern")])
    with pytest.raises(InputError, match=r"edits\[0\].*ln_final.hook_scale.*run_with_capture"):
        qwen_eqx.generate(tiny.model(), [TOKENS], max_new_tokens=1, edits=[Ablate(site="ln_final.hook_scale")])
