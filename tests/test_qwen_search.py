"""Threshold search against brute force over a small vocabulary; beam search against a plain reading of its rule."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_eqx
import tiny
import tolerances
from qwen_eqx import InputError, QwenConfig

PROMPT, NEW, STOP = [1, 2, 3], 4, 0
CONFIG = QwenConfig("qwen2", 6, 16, 2, 4, 2, 6, 24, 64, rope_theta=10_000.0)


@functools.cache
def small(seed: int) -> qwen_eqx.Qwen:
    return tiny.random_model(CONFIG, seed)


_forward = eqx.filter_jit(lambda model, row: jax.nn.log_softmax(model(row), axis=-1))


@functools.cache
def next_log_probs(seed: int, written: tuple[int, ...]) -> np.ndarray:
    row = (PROMPT + list(written) + [0] * NEW)[: len(PROMPT) + NEW]
    return np.asarray(_forward(small(seed), jnp.asarray(row))[len(PROMPT) + len(written) - 1], np.float64)


def every_completion(seed: int, p: float, written: tuple[int, ...] = (), log_prob: float = 0.0):
    """All completions of probability at least p, by trying every token everywhere."""
    if log_prob < np.log(p):
        return
    if len(written) == NEW or written[-1:] == (STOP,):
        yield log_prob, written
        return
    for token, more in enumerate(next_log_probs(seed, written)):
        yield from every_completion(seed, p, (*written, token), log_prob + more)


@settings(max_examples=8)
@given(seed=st.integers(0, 5), p=st.sampled_from([0.7, 0.25, 0.05, 0.02]))
def test_threshold_search_equals_brute_force(seed: int, p: float):
    wanted = sorted(every_completion(seed, p), reverse=True)
    found = qwen_eqx.threshold_search(small(seed), PROMPT, p=p, max_new_tokens=NEW, stop_tokens=[STOP])
    assert [tuple(row.tolist()) for row in found.tokens] == [row for _, row in wanted]
    np.testing.assert_allclose(found.log_probs, [log_prob for log_prob, _ in wanted], **tolerances.LOGITS_F32)


def test_brute_force_finds_something_to_compare():
    assert sum(len(list(every_completion(seed, 0.02))) for seed in range(6)) > 12


def plain_beams(seed: int, beams: int, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """Keep the best `beams` unfinished; of a step's best `beams` candidates those that end are finished."""
    running, finished = [(0.0, ())], []
    for step in range(1, NEW + 1):
        every = [(s + more, (*row, t)) for s, row in running for t, more in enumerate(next_log_probs(seed, row))]
        every.sort(reverse=True)
        over = [(s, row) for s, row in every[:beams] if row[-1] == STOP or step == NEW]
        finished = sorted([*finished, *((s / step**penalty, row) for s, row in over)], reverse=True)[:beams]
        running = [(s, row) for s, row in every if row[-1] != STOP][:beams]
        worst = finished[-1][0] if len(finished) == beams else -1e9
        if running[0][0] / step**penalty <= worst:
            break
    return finished


@settings(max_examples=8)
@given(seed=st.integers(0, 5), beams=st.sampled_from([1, 2, 3]), penalty=st.sampled_from([0.0, 1.0]))
def test_beam_search_equals_its_rule(seed: int, beams: int, penalty: float):
    wanted = plain_beams(seed, beams, penalty)
    found = qwen_eqx.beam_search(
        small(seed), PROMPT, beams=beams, max_new_tokens=NEW, stop_tokens=[STOP], length_penalty=penalty
    )
    assert [tuple(row.tolist()) for row in found.tokens] == [row for _, row in wanted]
    np.testing.assert_allclose(found.log_probs, [value for value, _ in wanted], **tolerances.LOGITS_F32)


def test_one_beam_is_greedy():
    greedy = qwen_eqx.generate(tiny.model(), [PROMPT], max_new_tokens=6, stop_tokens=[5])
    found = qwen_eqx.beam_search(tiny.model(), PROMPT, beams=1, max_new_tokens=6, stop_tokens=[5])
    np.testing.assert_array_equal(found.tokens[0], greedy.tokens[0, : int(greedy.lengths[0])])


def test_one_token_is_a_search_too():
    found = qwen_eqx.threshold_search(small(0), PROMPT, p=0.02, max_new_tokens=1, stop_tokens=[STOP])
    probable = [token for token, value in enumerate(next_log_probs(0, ())) if value >= np.log(0.02)]
    assert sorted(row[0] for row in found.tokens) == probable


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda m: qwen_eqx.threshold_search(m, PROMPT, p=0.0, max_new_tokens=2),
            "p: found 0.0, expected a probability",
        ),
        (
            lambda m: qwen_eqx.threshold_search(m, PROMPT, p=1.5, max_new_tokens=2),
            "p: found 1.5, expected a probability",
        ),
        (lambda m: qwen_eqx.beam_search(m, PROMPT, beams=0, max_new_tokens=2), "beams: found 0"),
        (lambda m: qwen_eqx.beam_search(m, PROMPT, beams=4, max_new_tokens=2), "beams: found 4, expected at most 3"),
        (lambda m: qwen_eqx.beam_search(m, [], beams=1, max_new_tokens=2), r"prompts\[0\]: found no token"),
    ],
)
def test_refusals(call, line: str):
    with pytest.raises(InputError, match=line):
        call(small(0))
