"""Refill changes nothing: through any number of slots, in either order, each prompt gets what it gets alone."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_eqx
import tiny
import tolerances
from qwen_eqx import Capture, Chain, InputError, RepetitionPenalty, Steer, Temperature, TopP

NEW = 6
SAMPLED = Chain(RepetitionPenalty(1.3), Temperature(0.8), TopP(0.95))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 97, rng.integers(1, 15)).tolist() for _ in range(count)]


def options(**more):
    return {"max_new_tokens": NEW, "stop_tokens": [*range(30)], "key": jax.random.key(3), "sampler": SAMPLED, **more}


def assert_same(completion: qwen_eqx.Completion, alone: qwen_eqx.Generation, row: int) -> None:
    length = int(alone.lengths[row])
    assert completion.length == length
    np.testing.assert_array_equal(completion.tokens, alone.tokens[row, :length])
    np.testing.assert_allclose(completion.log_probs, alone.log_probs[row, :length], **tolerances.SAME_F32)
    if alone.activations is not None:
        found = np.asarray(completion.activations)[:, :length]
        np.testing.assert_allclose(found, alone.activations[:, row, :length], **tolerances.SAME_F32)


@settings(max_examples=3)
@given(seed=st.integers(0, 99), slots=st.sampled_from([1, 3]), order=st.sampled_from(["finished", "arrival"]))
def test_slots_refill_and_order_change_nothing(seed: int, slots: int, order: str):
    asked, how = prompts(7, seed), options(capture=Capture(layers=[0, 1]))
    alone = qwen_eqx.generate(tiny.model(), asked, samples=2, **how)
    found = list(
        qwen_eqx.schedule(tiny.model(), asked, slots=slots, samples=2, order=order, max_prompt_tokens=16, **how)
    )
    assert sorted((c.item, c.sample) for c in found) == list(itertools.product(range(7), range(2)))
    if order == "arrival":
        assert [(c.item, c.sample) for c in found] == list(itertools.product(range(7), range(2)))
    for completion in found:
        assert_same(completion, alone, completion.item * 2 + completion.sample)


def test_prompt_activations_come_along():
    asked = prompts(4)
    capture = Capture(layers=[1], positions="all")
    found = qwen_eqx.schedule(tiny.model(), asked, slots=2, capture=capture, **options())
    for completion in found:
        prompt = asked[completion.item]
        _, acts = tiny.model().run_with_capture(jax.numpy.asarray(prompt), ["model.layers.1"])
        kept = np.asarray(completion.prompt_activations)[0, -len(prompt) :]
        np.testing.assert_allclose(kept, acts["model.layers.1"], **tolerances.SAME_F32)


def test_edits_reach_every_slot():
    edit = Steer(jax.numpy.full(16, 3.0), site="blocks.0.hook_resid_post", where="generated")
    asked = prompts(5)
    alone = qwen_eqx.generate(tiny.model(), asked, edits=[edit], **options())
    assert (alone.tokens != qwen_eqx.generate(tiny.model(), asked, **options()).tokens).any()
    for completion in qwen_eqx.schedule(tiny.model(), asked, slots=2, edits=[edit], **options()):
        assert_same(completion, alone, completion.item)


def test_an_endless_stream_is_read_no_further_than_needed():
    read = []

    def stream():
        for number in itertools.count():
            read.append(number)
            yield [number % 97]

    found = qwen_eqx.schedule(tiny.model(), stream(), slots=2, max_prompt_tokens=16, order="arrival", **options())
    assert [next(found).item for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(read) <= 5 + 4 * 2 + 1


def test_limits_lower_the_budget_of_single_prompts():
    asked, limits = prompts(5), [1, 6, 2, 99, 3]
    how = options(stop_tokens=[])
    found = list(qwen_eqx.schedule(tiny.model(), asked, slots=2, limits=limits, **how))
    assert {c.item: c.length for c in found} == {n: min(limit, NEW) for n, limit in enumerate(limits)}
    whole = qwen_eqx.generate(tiny.model(), asked, **how)
    for c in found:
        np.testing.assert_array_equal(c.tokens, whole.tokens[c.item, : c.length])


def test_no_prompt_no_completion():
    assert list(qwen_eqx.schedule(tiny.model(), [], slots=2, **options())) == []


def test_progress_hears_of_every_completion():
    heard = []
    list(qwen_eqx.schedule(tiny.model(), prompts(4), slots=2, progress=heard.append, **options()))
    assert sorted(c.item for c in heard) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"slots": 0}, "slots: found 0, expected a whole number of at least 1"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: found no token"),
        ({"prompts": [[1], [97]]}, r"prompts\[1\]\[0\]: found 97"),
        ({"prompts": [[1] * 60]}, r"prompts\[0\]: found 60 tokens, expected at most 58"),
        ({"prompts": iter([[1]])}, "max_prompt_tokens: missing"),
        ({"max_new_tokens": 1 << 20}, "nothing is ever truncated"),
        ({"max_new_tokens": 1 << 40}, "max_new_tokens: found 1099511627776, expected a whole number of at most"),
    ],
)
def test_refusals(change: dict, line: str):
    arguments = {"prompts": [[1]], "slots": 1, "max_new_tokens": NEW} | change
    asked = arguments.pop("prompts")
    with pytest.raises(InputError, match=line):
        list(qwen_eqx.schedule(tiny.model(), asked, **arguments))


def test_a_late_prompt_that_is_too_long_is_named():
    found = qwen_eqx.schedule(tiny.model(), iter([[1], [1] * 9]), slots=1, max_new_tokens=2, max_prompt_tokens=8)
    assert next(found).item == 0
    with pytest.raises(InputError, match=r"prompts\[1\]: found 9 tokens, expected at most max_prompt_tokens=8"):
        next(found)


def test_the_ring_turns_many_times():
    """Far more steps than the cache has entries: positions and visibility survive the wrap."""
    asked = prompts(30, seed=5)
    alone = qwen_eqx.generate(tiny.model(), asked, **options(stop_tokens=[]))
    found = list(qwen_eqx.schedule(tiny.model(), asked, slots=2, **options(stop_tokens=[])))
    assert math.ceil(30 / 2) * NEW > 2 * (16 + NEW)
    for completion in found:
        assert_same(completion, alone, completion.item)
