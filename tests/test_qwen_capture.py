"""`run_with_capture` as people call it: lists and arrays, one sequence or many, eager or inside another transformation."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
import tiny
import tolerances
from qwen_eqx import Ablate, AbstractEdit, InputError, Patch, Qwen, Replace, Steer

SITES = ("model.layers.0", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post")
TOKENS = [5, 9, 1, 96, 0, 3, 3]
BATCH = [[5, 9, 1], [7], list(range(20))]
RNG = np.random.default_rng(0)
DIRECTIONS = jnp.asarray(RNG.normal(size=(3, 16)), jnp.float32)
VALUES = jnp.asarray(RNG.normal(size=(3, 2, 16)), jnp.float32)


@eqx.filter_jit
def traced(model: Qwen, tokens: jax.Array, edits: list[AbstractEdit]):
    """A pass without pads: nothing is bucketed where the ids are traced."""
    return model.run_with_capture(tokens, SITES, edits=edits)


def same(found, expected):
    np.testing.assert_allclose(found, expected, **tolerances.SAME_F32)


@given(tokens=strategies.token_ids(97, 1, 60))
@settings(max_examples=12)
def test_the_bucket_changes_nothing(tokens: list[int]):
    logits, acts = tiny.model().run_with_capture(tokens, SITES)
    expected, places = traced(tiny.model(), jnp.asarray(tokens), [])
    assert logits.shape == (len(tokens), 97)
    same(logits, expected)
    assert list(acts) == list(SITES)
    for site in SITES:
        assert acts[site].shape == places[site].shape
        same(acts[site], places[site])


@given(rows=st.lists(strategies.token_ids(97, 1, 20), min_size=1, max_size=3))
@settings(max_examples=12)
def test_a_batch_is_its_rows_and_zeros(rows: list[list[int]]):
    longest = max(map(len, rows))
    for mode in ("all", "last", None):
        logits, acts = tiny.model().run_with_capture(rows, SITES, logits=mode)
        if mode is None:
            assert logits is None
        else:
            assert logits.shape == ((len(rows), longest, 97) if mode == "all" else (len(rows), 97))
        for row, tokens in enumerate(rows):
            alone, places = tiny.model().run_with_capture(tokens, SITES)
            if mode == "all":
                same(logits[row, : len(tokens)], alone)
                assert not np.asarray(logits[row, len(tokens) :]).any()
            elif mode == "last":
                same(logits[row], alone[-1])
                same(tiny.model().run_with_capture(tokens, [], logits="last")[0], alone[-1])
            for site in SITES:
                assert acts[site].shape[:2] == (len(rows), longest)
                same(acts[site][row, : len(tokens)], places[site])
                assert not np.asarray(acts[site][row, len(tokens) :]).any()


MATRIX = [[1, 2, 3], [4, 5, 6]]
SPELLED = {
    "an array": (jnp.asarray(TOKENS), TOKENS),
    "a NumPy array": (np.asarray(TOKENS, np.int64), TOKENS),
    "a tuple": (tuple(TOKENS), TOKENS),
    "a list of NumPy numbers": (list(np.asarray(TOKENS)), TOKENS),
    "a matrix": (jnp.asarray(MATRIX), MATRIX),
    "a list of arrays": ([jnp.asarray(row) for row in MATRIX], MATRIX),
    "a batch of one": (np.asarray([TOKENS]), [TOKENS]),
}


@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling_is_that_of_lists(name: str):
    given, listed = SPELLED[name]
    for found, expected in zip(
        *(jax.tree.leaves(tiny.model().run_with_capture(p, SITES)) for p in (given, listed)), strict=True
    ):
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


EDITS_BY_ROW = {
    "steer": lambda row: Steer(DIRECTIONS if row is None else DIRECTIONS[row], 2.0, site="blocks.0.hook_resid_post"),
    "ablate": lambda row: Ablate(DIRECTIONS if row is None else DIRECTIONS[row], site="blocks.1.hook_resid_pre"),
    "patch": lambda row: Patch(
        VALUES if row is None else VALUES[row], jnp.asarray([0, -1]), site="blocks.0.hook_mlp_out"
    ),
    "patch, one set of values": lambda row: Patch(VALUES[0], jnp.asarray([0, -2]), site="blocks.0.hook_mlp_out"),
    "places by row": lambda row: Patch(
        VALUES if row is None else VALUES[row],
        (jnp.asarray([[0, 2], [-1, 1], [17, -1]]) if row is None else jnp.asarray([[0, 2], [-1, 1], [17, -1]])[row]),
        site="blocks.0.hook_resid_mid",
    ),
    "the last": lambda row: Ablate(site="blocks.0.hook_attn_out", where=[-1]),
    "from the last on": lambda row: Ablate(site="blocks.0.hook_attn_out", where="generated"),
    "a function": lambda row: Replace(jnp.tanh, site="blocks.0.hook_resid_post"),
}


@pytest.mark.parametrize("name", EDITS_BY_ROW)
def test_edits_of_a_batch_are_those_of_its_rows(name: str):
    batch = [[*row, 4, 4] for row in BATCH]
    logits, acts = tiny.model().run_with_capture(batch, SITES, edits=[EDITS_BY_ROW[name](None)])
    plain, _ = tiny.model().run_with_capture(batch, [])
    for row, tokens in enumerate(batch):
        alone, places = traced(tiny.model(), jnp.asarray(tokens), [EDITS_BY_ROW[name](row)])
        same(logits[row, : len(tokens)], alone)
        for site in SITES:
            same(acts[site][row, : len(tokens)], places[site])
        assert np.abs(logits[row, len(tokens) - 1] - plain[row, len(tokens) - 1]).max() > 1e-3


def test_minus_one_is_the_last_position():
    found, expected = (
        tiny.model().run_with_capture(TOKENS, [], edits=[Patch(VALUES[0], where, site="model.layers.0")])[0]
        for where in ([-7, -1], [0, 6])
    )
    np.testing.assert_array_equal(found, expected)


def test_it_composes():
    model, steer = tiny.model(), lambda d: [Steer(d, site="blocks.0.hook_resid_post")]

    def last(tokens, direction):
        return model.run_with_capture(tokens, [], edits=steer(direction), logits="last")[0]

    expected = [last(TOKENS, direction) for direction in DIRECTIONS]
    for found in (jax.vmap(lambda d: last(TOKENS, d))(DIRECTIONS), last([TOKENS] * 3, DIRECTIONS)):
        same(found, jnp.stack(expected))
    tokens = jnp.asarray([TOKENS] * 3)
    same(jax.jit(jax.vmap(last))(tokens, DIRECTIONS), jnp.stack(expected))
    same(jax.jit(last)(TOKENS, DIRECTIONS[0]), expected[0])  # a list of traced ids
    step = jnp.zeros(16).at[3].set(1e-3)
    slope = jax.grad(lambda d: last(TOKENS, d)[5])(DIRECTIONS[0])
    change = last(TOKENS, DIRECTIONS[0] + step)[5] - last(TOKENS, DIRECTIONS[0] - step)[5]
    assert float(slope[3]) == pytest.approx(float(change) / 2e-3, rel=0.05, abs=1e-3)
    weights = eqx.filter_grad(lambda m: m.run_with_capture(TOKENS, [])[0].sum())(model)
    assert np.abs(weights.blocks[0].attn.q.weight).max() > 0


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


def test_lengths_of_a_bucket_and_values_share_one_compilation():
    for tokens, scale in (([1, 2], 1.0), (list(range(16)), 2.0), ([5] * 9, 3.0)):
        tiny.model().run_with_capture(tokens, ["model.layers.0"], edits=[Counting(scale * DIRECTIONS[0])])
    assert Counting.traces == [(1, 16, 16)]


def test_the_last_position_makes_no_other_logits():
    """In the compiled program no product has as many rows as there are positions and as many columns as the vocabulary."""
    model = tiny.model()
    for mode, there in (("all", True), ("last", False)):
        text = jax.make_jaxpr(lambda t, mode=mode: model.run_with_capture(t, [], logits=mode)[0])(jnp.arange(20))
        assert ("f32[20,97]" in str(text)) == there


def steered(**at):
    return Steer(DIRECTIONS[0], site="model.layers.0", **at)


BAD = {
    "an id beyond the vocabulary": (lambda m: m.run_with_capture([1, 99999], []), ["prompts[1]", "99999"]),
    "an id of a row": (lambda m: m.run_with_capture([[1], [2, -1]], []), ["prompts[1][1]", "-1"]),
    "no token": (lambda m: m.run_with_capture([], []), ["prompts", "no token"]),
    "a row without any": (lambda m: m.run_with_capture([[1], []], []), ["prompts[1]", "no token"]),
    "an empty array": (lambda m: m.run_with_capture(jnp.zeros(0, jnp.int32), []), ["prompts", "no token"]),
    "more than the model holds": (lambda m: m.run_with_capture([1] * 65, []), ["65", "64"]),
    "text": (lambda m: m.run_with_capture("hello", []), ["prompts", "str", "token ids"]),
    "texts": (lambda m: m.run_with_capture(["hello"], []), ["prompts[0]", "encode"]),
    "floats": (lambda m: m.run_with_capture(jnp.ones(3), []), ["prompts", "whole numbers"]),
    "a cube": (lambda m: m.run_with_capture(np.zeros((1, 2, 3), int), []), ["prompts", "(1, 2, 3)"]),
    "other logits": (lambda m: m.run_with_capture([1], [], logits="first"), ["logits", "first", "last"]),
    "a position beyond": (
        lambda m: m.run_with_capture([1, 2], [], edits=[steered(where=[0, 5000])]), ["edits[0].where", "5000", "-2..1"]
    ),
    "a position before": (lambda m: m.run_with_capture([1, 2], [], edits=[steered(where=[-3])]), ["-3", "-2..1"]),
    "a position beyond one row": (
        lambda m: m.run_with_capture([[1, 2], [1]], [], edits=[steered(where=[1])]), ["found position 1", "row 1"]
    ),
    "directions for other rows": (
        lambda m: m.run_with_capture([[1], [2]], [], edits=[Steer(DIRECTIONS, site="model.layers.0")]),
        ["edits[0].direction", "3 rows", "2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name: str):
    call, parts = BAD[name]
    with pytest.raises(InputError) as caught:
        call(tiny.model())
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_traced_ids_that_do_not_fit_are_refused_too():
    for bad in (jnp.zeros(0, jnp.int32), jnp.ones(3)):
        with pytest.raises(InputError, match=r"^prompts: found"):
            eqx.filter_jit(tiny.model().run_with_capture)(bad, [])
