"""What edits do to predictions: sums in float64 over plain logits, and exactly nothing where nothing is changed."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import strategies
import tiny
import tolerances
from qwen_eqx import (
    Ablate,
    AbstractEdit,
    Effect,
    Given,
    InputError,
    Patch,
    Qwen,
    Replace,
    Steer,
    captured,
    captured_padded,
    effect,
    effects,
)
from qwen_eqx.text.ids import bucket

TOKENS = list(range(3, 24))
RNG = np.random.default_rng(0)
MATRIX = jnp.asarray(RNG.normal(size=(16, 16)) / 4, jnp.float32)
DIRECTION = jnp.asarray(RNG.normal(size=16), jnp.float32)
SEVERAL = [
    Steer(DIRECTION, 1.5, site="blocks.0.hook_resid_post"),
    Ablate(site="blocks.0.attn.hook_z", where=jnp.asarray([1, 4, 17])),
    Ablate(DIRECTION, site="blocks.1.hook_mlp_out"),
    Ablate(DIRECTION, site="model.layers.0"),
]
RUNS = {
    "nothing": [],
    "zero": [Ablate(site="blocks.1.hook_resid_pre")],
    "patch": [Patch(jnp.ones((2, 16)), jnp.asarray([0, 5]), site="blocks.0.hook_mlp_out")],
    "several": SEVERAL,
}


class Map(eqx.Module):
    """x W."""

    weight: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight


def logits(model: Qwen, tokens: list[int], edits: list[AbstractEdit]) -> np.ndarray:
    """Traced, so that positions beyond a short document are not looked at: they are no fault of an effect."""
    return np.asarray(_logits(model, jnp.asarray(tokens), edits), np.float64)


@eqx.filter_jit
def _logits(model: Qwen, tokens: jax.Array, edits: list[AbstractEdit]) -> jax.Array:
    return model.run_with_capture(tokens, [], edits=edits)[0]


def expected(model: Qwen, tokens: list[int], edits: list[AbstractEdit]) -> dict[str, float]:
    """The definitions, in float64, from logits of passes without pads."""
    plain, edited = logits(model, tokens, []), logits(model, tokens, edits)
    log_p, log_q = (oracles.log_softmax(table[:-1]) for table in (plain, edited))
    came = np.arange(len(tokens) - 1), np.asarray(tokens[1:], int)
    return {
        "ce": -log_p[came].sum(),
        "ce_edited": -log_q[came].sum(),
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(),
        "change": np.abs(plain - edited).max(),
        "predictions": len(tokens) - 1,
    }


def assert_is(found: Effect, wanted: dict[str, float]):
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(found, name), value, err_msg=name, **tolerances.LOGITS_F32)


@pytest.mark.parametrize("name", RUNS)
def test_an_effect_is_its_definition_in_float64(name: str):
    wanted = expected(tiny.model(), TOKENS, RUNS[name])
    assert_is(effect(tiny.model(), TOKENS, RUNS[name]), wanted)
    assert (wanted["kl"] > 1e-3) == (name != "nothing")


@given(tokens=strategies.token_ids(97, 1, 16), name=st.sampled_from(list(RUNS)))
@settings(max_examples=6)
def test_pads_count_for_nothing(tokens: list[int], name: str):
    """All lengths share a bucket, and a document of one token predicts none."""
    assert_is(effect(tiny.model(), tokens, RUNS[name]), expected(tiny.model(), tokens, RUNS[name]))


def test_runs_compared_together_are_those_compared_alone():
    together = effects(tiny.model(), TOKENS, RUNS)
    assert list(together) == list(RUNS)
    for name, edits in RUNS.items():
        for ours, alone in zip(
            *map(jax.tree.leaves, (together[name], effect(tiny.model(), TOKENS, edits))), strict=True
        ):
            np.testing.assert_allclose(ours, alone, err_msg=name, **tolerances.SAME_F32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_changes_nothing_has_no_effect_to_the_last_bit(dtype: str):
    """No edit, steps of length zero, and a dictionary beside its own error, at one site or at several."""
    model, sites = tiny.model(dtype=dtype), ("blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_q")
    made = {site: Given(jnp.asarray(RNG.normal(size=value.shape), jnp.float32)) for site, value in
            captured_padded(model, TOKENS, sites).items()}  # fmt: skip
    runs = {
        "no edit": [],
        "no step": [Steer(DIRECTION, 0.0, site=sites[0])],
        "an error kept": [Replace(Map(MATRIX), error_of=Map(MATRIX), site=sites[1])],
        "errors kept": [Replace(given, error_of=given, site=site) for site, given in made.items()],
        "a change": [Ablate(site=sites[1])],
    }
    found = effects(model, TOKENS, runs)
    assert float(found["a change"].kl) > 1e-3
    for name in list(runs)[:-1]:
        one = found[name]
        assert (float(one.kl), float(one.change), float(one.ce_edited)) == (0.0, 0.0, float(one.ce)), name


def test_given_values_stand_at_all_their_sites():
    """As for a dictionary that writes several sites: later sites get theirs whatever the earlier ones did to the stream."""
    sites = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")
    before = captured_padded(tiny.model(), TOKENS, sites)
    made = {site: Given(value @ MATRIX) for site, value in before.items()}
    edits = [Replace(value, site=site) for site, value in made.items()]
    patches = [Patch(made[site].value[: len(TOKENS)], jnp.arange(len(TOKENS)), site=site) for site in sites]
    assert_is(effect(tiny.model(), TOKENS, edits), expected(tiny.model(), TOKENS, patches))


def test_what_stands_at_a_site_put_back_has_no_effect():
    sites = ("blocks.0.hook_attn_out", "blocks.1.hook_resid_pre")
    edits = [Replace(Given(x), site=site) for site, x in captured_padded(tiny.model(), TOKENS, sites).items()]
    assert float(effect(tiny.model(), TOKENS, edits).change) < tolerances.SAME_F32["atol"]


def test_the_last_position_predicts_nothing():
    """It is the only one whose logits would choose a generated token."""
    found = effect(tiny.model(), TOKENS, [Ablate(site="blocks.1.hook_resid_post", where="generated")])
    assert float(found.kl) == 0.0
    assert float(found.change) > 0.1


def test_documents_add_up():
    one, other = (effect(tiny.model(), tokens, SEVERAL) for tokens in (TOKENS, TOKENS[::-2]))
    both = one + other
    assert int(both.predictions) == len(TOKENS) - 1 + len(TOKENS[::-2]) - 1
    for name in ("ce", "ce_edited", "kl"):
        assert float(getattr(both, name)) == pytest.approx(float(getattr(one, name)) + float(getattr(other, name)))
    assert float(both.change) == max(float(one.change), float(other.change))


class Counting(AbstractEdit):
    """Steering that counts how often it is traced."""

    direction: jax.Array
    site: str = eqx.field(static=True, default="blocks.0.hook_mlp_out")
    where: str = "all"
    traces: ClassVar[list] = []

    def edited(self, x, positions):
        self.traces.append(x.shape)
        return x + self.direction[None, None, :]

    def check(self, site, config):
        return None


def test_one_compilation_serves_all_lengths_of_a_bucket_and_all_values():
    for tokens, scale in (([1, 2], 1.0), (list(range(16)), 2.0), ([5] * 9, 3.0)):
        effect(tiny.model(), tokens, [Counting(scale * DIRECTION)])
    assert Counting.traces == [(1, 16, 16)]


@pytest.mark.parametrize("tokens", [TOKENS, jnp.asarray(TOKENS)], ids=["list", "array"])
def test_captured_is_what_a_plain_pass_captures(tokens):
    sites = ["model.layers.1", "blocks.0.attn.hook_k", "blocks.1.mlp.hook_post", "model.layers.1"]
    found = captured(tiny.model(), tokens, sites)
    acts = tiny.model().run_with_capture(jnp.asarray(TOKENS), sites)[1]
    assert list(found) == sites[:3]
    for site, value in found.items():
        np.testing.assert_allclose(value, acts[site], **tolerances.SAME_F32)
    padded = captured_padded(tiny.model(), tokens, sites)
    for site, value in padded.items():
        assert value.shape[0] == bucket(len(TOKENS))
        np.testing.assert_array_equal(value[: len(TOKENS)], found[site])


def test_a_bucket_may_be_wider_than_the_model():
    """48 positions for 33 tokens, of a model that holds 40."""
    model = tiny.random_model(dataclasses.replace(tiny.CONFIGS["qwen2"], max_seq=40))
    padded = captured_padded(model, TOKENS + TOKENS[:12], ["model.layers.1"])["model.layers.1"]
    np.testing.assert_array_equal(
        padded[:33], captured(model, TOKENS + TOKENS[:12], ["model.layers.1"])["model.layers.1"]
    )
    assert padded.shape[0] == 48


BAD = {
    "an id beyond the vocabulary": (lambda: effect(tiny.model(), [1, 97], []), [r"tokens[1]", "97"]),
    "an id to capture": (lambda: captured(tiny.model(), [-1], ["model.layers.0"]), [r"prompts[0]", "-1"]),
    "an unknown site": (lambda: effect(tiny.model(), TOKENS, [Ablate(site="model.layers.7")]), ["model.layers.7"]),
    "another width": (
        lambda: effect(tiny.model(), TOKENS, [Steer(jnp.ones(5), site="model.layers.0")]), ["Steer.direction", "5"]
    ),
    "too few given rows": (
        lambda: effect(tiny.model(), TOKENS, [Replace(Given(jnp.ones((3, 16))), site="model.layers.0")]),
        ["Given.value", "3", "24"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str):
    call, parts = BAD[name]
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
