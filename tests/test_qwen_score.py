"""Scores are the plain forward's log-probabilities, however much is shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_eqx
import tiny
import tolerances
from qwen_eqx import InputError
from qwen_eqx import score as score_function

tokens = st.lists(st.integers(0, 96), min_size=1, max_size=6)


def plain(prompt: list[int], completion: list[int]) -> np.ndarray:
    row = jnp.asarray(([*prompt, *completion] + [0] * 16)[:16])  # one shape; later tokens do not reach earlier ones
    log_probs = jax.nn.log_softmax(tiny.model()(row), axis=-1)
    return np.asarray([log_probs[len(prompt) - 1 + n, token] for n, token in enumerate(completion)])


@settings(max_examples=10)
@given(prompt=tokens, completions=st.lists(tokens, min_size=1, max_size=5))
def test_one_prompt_many_completions(prompt: list[int], completions: list[list[int]]):
    found = score_function(tiny.model(), prompt, completions, batch_size=4)
    for completion, log_probs in zip(completions, found, strict=True):
        np.testing.assert_allclose(log_probs, plain(prompt, completion), **tolerances.SAME_F32)


@settings(max_examples=10)
@given(
    common=st.lists(st.integers(0, 96), max_size=5), rows=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5)
)
def test_prompts_with_a_common_prefix(common: list[int], rows: list[tuple[list[int], list[int]]]):
    prompts, completions = [common + prompt for prompt, _ in rows], [completion for _, completion in rows]
    found = score_function(tiny.model(), prompts, completions, batch_size=4)
    for prompt, completion, log_probs in zip(prompts, completions, found, strict=True):
        row = jnp.asarray((prompt + completion + [0] * 24)[:24])
        wanted = jax.nn.log_softmax(tiny.model()(row), axis=-1)
        wanted = [wanted[len(prompt) - 1 + n, token] for n, token in enumerate(completion)]
        np.testing.assert_allclose(log_probs, np.asarray(wanted), **tolerances.SAME_F32)


def test_generated_log_probs_are_the_scores():
    out = qwen_eqx.generate(tiny.model(), [[1, 2, 3]], max_new_tokens=6)
    (found,) = score_function(tiny.model(), [1, 2, 3], [out.tokens[0].tolist()])
    np.testing.assert_allclose(found, out.log_probs[0], **tolerances.SAME_F32)


def test_nothing_to_score():
    assert score_function(tiny.model(), [1, 2], []) == []
    (empty,) = score_function(tiny.model(), [1, 2], [[]])
    assert empty.shape == (0,)


def test_refusals():
    with pytest.raises(InputError, match="prompt: found 2 prompts, expected one, or one for each of 3"):
        score_function(tiny.model(), [[1], [2]], [[1], [2], [3]])
    with pytest.raises(InputError, match=r"completions\[1\]\[0\]: found 97"):
        score_function(tiny.model(), [1], [[1], [97]])
    with pytest.raises(InputError, match=r"prompts\[0\]: found no token"):
        score_function(tiny.model(), [], [[1]])
