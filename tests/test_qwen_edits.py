"""An edit inside the compiled loop is a forward pass edited by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import qwen_eqx
import running
import tiny
import tolerances
from qwen_eqx import Ablate, InputError, Patch, Replace, Site, Steer
from running import NEW, PROMPTS, assert_same, greedy

RNG = np.random.default_rng(0)
D = RNG.normal(size=16)
VALUES = RNG.normal(size=(3, 16))
MATRIX = RNG.normal(size=(16, 16)) / 4
AT = np.asarray([0, 2, 17])


class Map(eqx.Module):
    """x W: what an autoencoder's reconstruction is to an edit."""

    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight


def f32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def project_out(x: np.ndarray) -> np.ndarray:
    return x - np.outer(x @ D, D) / (D @ D)


def put(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.stack([VALUES[list(AT).index(p)] if p in AT else row for p, row in zip(positions, x, strict=True)])


W, SMALL = MATRIX, MATRIX * 0.5
EDITS = {  # name -> the edit but for its place, and the same by hand
    "steer": (lambda **at: Steer(f32(D), 1.5, **at), lambda x, _: x + 1.5 * D),
    "ablate": (lambda **at: Ablate(f32(D), **at), lambda x, _: project_out(x)),
    "zero": (lambda **at: Ablate(**at), lambda x, _: 0 * x),
    "replace": (lambda **at: Replace(Map(f32(W)), **at), lambda x, _: x @ W),
    "replace, error kept": (
        lambda **at: Replace(Map(f32(W)), Map(f32(SMALL)), **at),
        lambda x, _: x @ W + (x - x @ SMALL),
    ),
    "patch": (lambda site, where: Patch(f32(VALUES), jnp.asarray(AT), site=site), put),
}
CASES = [
    [("steer", "blocks.0.hook_resid_post", "all")],
    [("steer", "blocks.1.hook_resid_pre", "prompt")],
    [("steer", "model.layers.0.mlp", "generated")],
    [("steer", "blocks.1.hook_attn_out", AT)],
    [("ablate", "blocks.0.hook_resid_mid", "all")],
    [("zero", "blocks.1.attn.hook_k", "prompt"), ("zero", "blocks.0.attn.hook_z", "generated")],
    [("replace", "blocks.0.hook_mlp_out", "all")],
    [("replace, error kept", "blocks.1.hook_resid_mid", "generated")],
    [("patch", "blocks.0.hook_resid_post", AT)],
    [
        ("steer", "blocks.0.hook_resid_post", "all"),
        ("ablate", "model.layers.0", "generated"),
        ("replace", "model.layers.0", AT),
        ("zero", "blocks.1.mlp.hook_post", "prompt"),
        ("patch", "blocks.1.hook_resid_pre", AT),
    ],
]


def made(case: list) -> list[qwen_eqx.AbstractEdit]:
    return [
        EDITS[kind][0](site=site, where=where if isinstance(where, str) else jnp.asarray(where))
        for kind, site, where in case
    ]


def applies(where, positions: np.ndarray, prompt: int) -> np.ndarray:
    if not isinstance(where, str):
        return np.isin(positions, where)
    return positions < prompt if where == "prompt" else positions >= (prompt - 1 if where == "generated" else 0)


def by_hand(case: list, prompt: int):
    """The case as what the oracle does at every site."""

    def edit(layer: int, kind: str, x: np.ndarray) -> np.ndarray:
        positions = np.arange(len(x))
        for name, site, where in case:
            if Site.parse(site, tiny.CONFIGS["qwen2"]) == Site(layer, kind):
                x = np.where(applies(where, positions, prompt)[:, None], EDITS[name][1](x, positions), x)
        return x

    return edit


@pytest.mark.parametrize("case", CASES, ids=lambda case: " + ".join(kind for kind, _, _ in case))
def test_generation_under_edits_is_the_forward_edited_by_hand(case: list):
    model = tiny.model()
    out = running.generate(PROMPTS, edits=made(case))
    assert not np.allclose(out.activations, greedy().activations)
    for row, prompt in enumerate(PROMPTS):
        tokens = np.asarray(out.tokens[row])
        logits, sites = oracles.decoder(model, [*prompt, *tokens[:-1].tolist()], by_hand(case, len(prompt)))
        chose = np.arange(len(prompt) - 1, len(prompt) + NEW - 1)
        np.testing.assert_array_equal(tokens, logits[chose].argmax(-1))
        expected = oracles.log_softmax(logits)[chose, tokens]
        np.testing.assert_allclose(out.log_probs[row], expected, **tolerances.LOGITS_F32)
        for index, name in enumerate(tiny.d_model_sites(model.config)):
            site = Site.parse(name, model.config)
            values = sites[site.layer, site.kind]
            np.testing.assert_allclose(out.activations[index, row], values[chose], **tolerances.LOGITS_F32)
            read = np.asarray(out.prompt_activations[index, row])[-len(prompt) :]
            np.testing.assert_allclose(read, values[: len(prompt)], **tolerances.LOGITS_F32)


def test_a_plain_pass_takes_edits_too():
    case, tokens = CASES[-1], [*PROMPTS[3], 36, 37]  # as long as the last position in AT asks
    logits, acts = tiny.model().run_with_capture(jnp.asarray(tokens), ["blocks.1.hook_resid_post"], edits=made(case))
    expected, sites = oracles.decoder(tiny.model(), tokens, by_hand(case, len(tokens)))
    np.testing.assert_allclose(logits, expected, **tolerances.LOGITS_F32)
    found = acts["blocks.1.hook_resid_post"]
    np.testing.assert_allclose(found, sites[1, "resid_post"], **tolerances.LOGITS_F32)


def test_edits_hold_in_chunked_prefill():
    edits = made(CASES[-1])
    assert_same(running.generate(PROMPTS, edits=edits, prefill_chunk=8), running.generate(PROMPTS, edits=edits))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_identity_edit_changes_no_bit(dtype: str):
    model = tiny.model(dtype=dtype)
    plain = running.generate(PROMPTS, model=model)
    nothing = [Steer(f32(D), 0.0, site=site) for site in ("model.layers.0", "blocks.1.hook_attn_out")]
    same = [Replace(Map(f32(W)), Map(f32(W)), site=site) for site in ("model.layers.1", "blocks.0.hook_mlp_out")]
    for edits in (nothing, same):
        assert_same(running.generate(PROMPTS, model=model, edits=edits), plain, exact=True)


BAD = {
    "a wrong direction": (Steer(f32(D[:5]), site="model.layers.0"), ["Steer.direction", "5", "16"]),
    "a direction for another site": (Ablate(f32(D), site="blocks.0.attn.hook_k"), ["Ablate.direction", "16", "12"]),
    "values of another width": (
        Patch(f32(VALUES[:, :4]), jnp.arange(3), site="model.layers.0"),
        ["Patch.values", "4", "16"],
    ),
    "no positions for values": (Patch(f32(VALUES), "all", site="model.layers.0"), ["Patch.where", "3 positions"]),
    "an unknown place": (Ablate(site="model.layers.7"), ["model.layers.7", "does not exist"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_edits_are_refused_in_one_line(name: str):
    edit, parts = BAD[name]
    with pytest.raises(InputError) as caught:
        qwen_eqx.generate(tiny.model(), PROMPTS, max_new_tokens=1, edits=[edit])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
