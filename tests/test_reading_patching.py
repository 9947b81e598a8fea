"""All patches in one call are the Python loop's; gradients at sites are finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import qwen_eqx
import tiny
import tolerances
from qwen_eqx import Ablate, InputError, Patch, Paths, Places, Qwen, Steer

CLEAN, CORRUPTED = [5, 9, 1, 46, 0], [5, 9, 7, 46, 0]
SEQ = len(CLEAN)


def metric(logits: jax.Array) -> jax.Array:
    return logits[..., 3] - logits[..., 9] * logits[..., 4]


def total(logits: jax.Array) -> jax.Array:
    return metric(logits).sum()


def by_hand(model: Qwen, place: dict[str, int], kind: str, clean: jax.Array) -> float:
    """One patched run, with `Patch`."""
    site = str(qwen_eqx.Site(place["layer"], kind))
    where = np.asarray([place["position"]] if "position" in place else range(SEQ))
    values, head = clean[where], place.get("head")
    if head is not None:
        per_head = qwen_eqx.Site.parse(site, model.config).per_head(model.config)
        values = values[:, head * per_head : (head + 1) * per_head]
    table, _ = model.run_with_capture(CORRUPTED, [], edits=[Patch(values, where, site=site, head=head)], logits="last")
    return float(metric(table))


CASES = {  # and the block whose patches are made one by one
    "streams by position": ("qwen2", Places("resid_mid"), 0),
    "results by head": ("qwen3", Places("result", "head"), 0),
    "keys of a block by head and position": ("qwen2", Places("k", "head and position", [1]), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_all_patches_at_once_are_the_loop_s(name: str):
    which, places, layer = CASES[name]
    model, site = tiny.model(which), str(qwen_eqx.Site(layer, places.kind))
    found = qwen_eqx.patch_effects(model, CLEAN, CORRUPTED, metric, places, at_once=4)  # the last chunk is filled up
    logits, clean = model.run_with_capture(CLEAN, [site], logits="last")
    np.testing.assert_allclose(found.clean, metric(logits), **tolerances.SAME_F32)
    flat = found.change.at(layer=layer).top(found.change.values.size)
    for place, change in flat[:: max(1, len(flat) // 4)]:
        expected = by_hand(model, place | {"layer": layer}, places.kind, clean[site]) - found.corrupted
        np.testing.assert_allclose(change, expected, **tolerances.LOGITS_F32)
    np.testing.assert_allclose(found.recovered.values * (found.clean - found.corrupted), found.change.values, rtol=1e-5)


def test_the_whole_stream_brings_the_clean_answer_back():
    """Before the position that differs nothing changes; at it the first block's stream is all there is to repair."""
    found = qwen_eqx.patch_effects(tiny.model(), CLEAN, CORRUPTED, metric).recovered
    np.testing.assert_allclose(found.at(layer=0).values, [0, 0, 1, 0, 0], atol=1e-4)


def test_paths_are_the_loop_s():
    """Sender's clean value in, all other heads held; the receivers as they were then, in a plain run."""
    model, config = tiny.model(), tiny.CONFIGS["qwen2"]
    receivers = {"blocks.1.attn.hook_q": [0, 3], "blocks.1.hook_resid_post": None}
    found = qwen_eqx.path_patch(model, CLEAN, CORRUPTED, metric, Paths(receivers), at_once=3)
    held = [f"blocks.{layer}.{kind}" for layer in range(2) for kind in ("attn.hook_z", "hook_mlp_out")]
    everywhere, d_head = np.arange(SEQ), config.d_head
    own, clean = (model.run_with_capture(prompt, held)[1] for prompt in (CORRUPTED, CLEAN))
    for layer, head in ((0, 0), (0, 2)):
        site, of = f"blocks.{layer}.attn.hook_z", slice(head * d_head, (head + 1) * d_head)
        edits = [Patch(own[each], everywhere, site=each) for each in held]
        edits.append(Patch(clean[site][:, of], everywhere, site=site, head=head))
        _, got = model.run_with_capture(CORRUPTED, list(receivers), edits=edits)
        heads = np.r_[:d_head, 3 * d_head : 4 * d_head]
        put = [
            Patch(got["blocks.1.attn.hook_q"][:, heads], everywhere, site="blocks.1.attn.hook_q", head=[0, 3]),
            Patch(got["blocks.1.hook_resid_post"], everywhere, site="blocks.1.hook_resid_post"),
        ]
        table, _ = model.run_with_capture(CORRUPTED, [], edits=put, logits="last")
        expected = float(metric(table)) - found.corrupted
        np.testing.assert_allclose(found.change.at(layer=layer, head=head).values, expected, **tolerances.LOGITS_F32)


def test_from_the_last_block_s_heads_all_paths_end_in_its_stream():
    model, receivers = tiny.model(), {"blocks.1.hook_resid_post": None}
    found = qwen_eqx.path_patch(model, CLEAN, CORRUPTED, metric, Paths(receivers, mlps="free")).change
    exact = qwen_eqx.patch_effects(model, CLEAN, CORRUPTED, metric, Places("z", "head")).change
    np.testing.assert_allclose(found.at(layer=1).values, exact.at(layer=1).values, **tolerances.LOGITS_F32)


SITES = [
    "hook_embed", "blocks.0.ln1.hook_scale", "blocks.0.attn.hook_k", "blocks.0.attn.hook_pattern",
    "blocks.0.attn.hook_z", "blocks.1.mlp.hook_in", "blocks.1.hook_resid_post", "ln_final.hook_scale",
]  # fmt: skip


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=3)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_gradients_are_finite_differences_in_float64(name: str, seed: int):
    model, rng = tiny.model(name), np.random.default_rng(seed)
    value, grads = qwen_eqx.grad_at(model, CLEAN, SITES, total)
    np.testing.assert_allclose(value, total(oracles.decoder(model, CLEAN)[0]), rtol=1e-4)
    for site in SITES:
        parsed, step = qwen_eqx.Site.parse(site, model.config), 1e-5
        along = rng.normal(size=parsed.shape(model.config, SEQ))

        def moved(size: float, parsed: qwen_eqx.Site = parsed, along: np.ndarray = along) -> float:
            def edit(layer: int, kind: str, x: np.ndarray) -> np.ndarray:
                return x + size * along if (layer, kind) == (parsed.layer, parsed.kind) else x

            return total(oracles.decoder(model, CLEAN, edit)[0])

        expected = (moved(step) - moved(-step)) / (2 * step)
        found = float(np.sum(np.asarray(grads[site], np.float64) * along))
        size = np.linalg.norm(grads[site]) * np.linalg.norm(along)
        assert abs(found - expected) <= 1e-4 * size + 1e-6, site


def test_gradients_are_of_what_the_edits_leave():
    site, direction = "blocks.0.hook_resid_post", jnp.ones(16)

    def grads(edit: qwen_eqx.AbstractEdit) -> jax.Array:
        return qwen_eqx.grad_at(tiny.model(), CLEAN, [site], metric, edits=[edit], logits="last")[1][site]

    plain, steered = (grads(Steer(direction, scale, site=site)) for scale in (0.0, 2.0))
    assert np.abs(steered - plain).max() > 1e-4
    assert not np.asarray(grads(Ablate(site="blocks.1.hook_resid_post"))).any()


def test_attribution_patching_is_the_slope_towards_the_clean_value():
    model, config = tiny.model(), tiny.CONFIGS["qwen2"]
    found = qwen_eqx.attribution_patch(model, CLEAN, CORRUPTED, metric, Places("z", "head and position")).change
    whole = qwen_eqx.attribution_patch(model, CLEAN, CORRUPTED, metric, Places("z")).change
    np.testing.assert_allclose(found.sum("head").values, whole.values, **tolerances.SAME_F32)
    (_, clean), (_, own) = (oracles.decoder(model, prompt) for prompt in (CLEAN, CORRUPTED))
    step = 1e-6
    for place, change in found.top(3):
        layer, position, head = place["layer"], place["position"], place["head"]
        columns = slice(head * config.d_head, (head + 1) * config.d_head)
        towards = np.zeros_like(own[layer, "z"])
        towards[position, columns] = (clean[layer, "z"] - own[layer, "z"])[position, columns]

        def moved(size: float, at: int = layer, towards: np.ndarray = towards) -> float:
            def edit(number: int, kind: str, x: np.ndarray) -> np.ndarray:
                return x + size * towards if (number, kind) == (at, "z") else x

            return metric(oracles.decoder(model, CORRUPTED, edit)[0][-1])

        np.testing.assert_allclose(change, (moved(step) - moved(-step)) / (2 * step), rtol=1e-3, atol=1e-4)


MODEL = tiny.model()
WRONG = {
    "two lengths": (lambda: qwen_eqx.patch_effects(MODEL, CLEAN, [1], metric), ["5 and 1"]),
    "no kind": (lambda: qwen_eqx.patch_effects(MODEL, CLEAN, CORRUPTED, metric, Places("pattern")), ["pattern", "one of"]),
    "no heads": (lambda: qwen_eqx.patch_effects(MODEL, CLEAN, CORRUPTED, metric, Places("mlp_out", "head")), ["q, k, v, z"]),
    "no block": (lambda: qwen_eqx.patch_effects(MODEL, CLEAN, CORRUPTED, metric, Places(layers=[2])), ["blocks.2"]),
    "no layers": (lambda: qwen_eqx.patch_effects(MODEL, CLEAN, CORRUPTED, metric, Places(layers=[])), ["at least one"]),
    "none at once": (lambda: qwen_eqx.patch_effects(MODEL, CLEAN, CORRUPTED, metric, at_once=0), ["at_once"]),
    "no receiver": (lambda: qwen_eqx.path_patch(MODEL, CLEAN, CORRUPTED, metric, Paths({})), ["receivers: found none"]),
    "a head": (
        lambda: qwen_eqx.path_patch(MODEL, CLEAN, CORRUPTED, metric, Paths({"blocks.1.attn.hook_k": [2]})),
        ["head 2", "0..1"],
    ),
    "no token": (lambda: qwen_eqx.grad_at(MODEL, [], [], metric), ["tokens: found 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_patched_is_refused_in_one_line(name: str):
    call, parts = WRONG[name]
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)
