"""Samplers against NumPy: what a filter keeps, and how often what it keeps is drawn."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import qwen_eqx
import tiny
from qwen_eqx import Chain, Greedy, InputError, MinP, RepetitionPenalty, Temperature, TopK, TopP
from qwen_eqx.generation.sample import _invert, draw, likeliest

VOCAB, DRAWS = 23, 20_000
LOGITS = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2
SEEN = np.random.default_rng(1).random(VOCAB) < 0.4


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(oracles.log_softmax(logits.astype(np.float64)))


def keep(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.where(kept, logits, -np.inf)


def penalized(logits: np.ndarray, penalty: float) -> np.ndarray:
    return np.where(SEEN, np.where(logits > 0, logits / penalty, logits * penalty), logits)


FILTERS: dict[str, tuple[qwen_eqx.AbstractSampler, Callable[[np.ndarray], np.ndarray]]] = {
    "plain": (Temperature(1.0), lambda x: x),
    "hot": (Temperature(1.7), lambda x: x / 1.7),
    "cold": (Temperature(0.5), lambda x: x / 0.5),
    "top 5": (TopK(5), lambda x: keep(x, x >= np.sort(x)[-5])),
    "top of more than all": (TopK(1000), lambda x: x),
    "nucleus": (TopP(0.8), lambda x: keep(x, oracles.nucleus(softmax(x), 0.8))),
    "least": (MinP(0.1), lambda x: keep(x, softmax(x) >= 0.1 * softmax(x).max())),
    "penalty": (RepetitionPenalty(1.8), lambda x: penalized(x, 1.8)),
    "chain": (
        Chain(RepetitionPenalty(1.3), Temperature(0.7), TopK(8), TopP(0.9)),
        lambda x: (
            lambda y: keep(y, oracles.nucleus(softmax(keep(y, y >= np.sort(y)[-8])), 0.9) & (y >= np.sort(y)[-8]))
        )(penalized(x, 1.3) / 0.7),
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_tokens_are_drawn_as_often_as_their_probability(name: str):
    """Chi-square at a fixed key; tokens that are filtered out never come."""
    sampler, by_hand = FILTERS[name]
    keys = jax.random.split(jax.random.key(4), DRAWS)
    tokens = sampler(
        jnp.broadcast_to(LOGITS, (DRAWS, VOCAB)), keys, jnp.broadcast_to(jnp.asarray(SEEN), (DRAWS, VOCAB))
    )
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    expected = DRAWS * softmax(by_hand(LOGITS))
    assert not counts[expected == 0].any()
    often = expected > 5  # the test's own condition; the rest is one class
    observed = np.append(counts[often], counts[~often].sum())
    hoped = np.append(expected[often], expected[~often].sum())
    observed, hoped = observed[hoped > 0], hoped[hoped > 0]
    assert scipy.stats.chisquare(observed, hoped * DRAWS / hoped.sum()).pvalue > 1e-3


def test_the_chi_square_would_notice():
    """The same draws against a temperature a tenth off."""
    keys = jax.random.split(jax.random.key(4), DRAWS)
    counts = np.bincount(np.asarray(draw(jnp.broadcast_to(LOGITS, (DRAWS, VOCAB)), keys)), minlength=VOCAB)
    hoped = DRAWS * softmax(LOGITS / 1.1)
    assert scipy.stats.chisquare(counts, hoped).pvalue < 1e-9


def test_draws_of_different_keys_are_independent():
    """Tokens of neighbouring keys: a table of pairs against the product of its margins."""
    keys = jax.random.split(jax.random.key(5), DRAWS)
    tokens = np.asarray(draw(jnp.broadcast_to(LOGITS, (DRAWS, VOCAB)), keys)) % 3
    table = np.histogram2d(tokens[0::2], tokens[1::2], bins=3)[0]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [1, 2, 300])
def test_the_only_token_left_is_drawn(vocab: int):
    for only in {0, vocab // 2, vocab - 1}:
        logits = jnp.full((50, vocab), -jnp.inf).at[:, only].set(-3.0)
        assert (np.asarray(draw(logits, jax.random.split(jax.random.key(only), 50))) == only).all()


def test_a_weight_of_zero_is_never_chosen():
    """A running sum taken as a tree is not monotone in its last bit, so a zero weight can seem to step over a target."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((64, 389)) < 0.5, 0, rng.random((64, 389))).astype(np.float32)
    cumulative = np.asarray(jnp.cumsum(jnp.asarray(weights), axis=-1))
    for column in range(1, 389):  # aim exactly below each running sum
        target = np.nextafter(cumulative[:, column], np.float32(0)) / cumulative[:, -1]
        chosen = np.asarray(_invert(jnp.asarray(weights), jnp.asarray(target.astype(np.float32))))
        assert (weights[np.arange(64), chosen] > 0).all()


@given(
    seed=st.integers(0, 999),
    vocab=st.sampled_from([7, 300, 1000]),
    p=st.floats(0.01, 1.0),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_top_p_keeps_the_nucleus(seed: int, vocab: int, p: float, spread: float):
    """Flat rows over a large vocabulary too, whose nucleus is found by bisection. float32 sums may miss p by 1e-5."""
    logits = (np.random.default_rng(seed).normal(size=(3, vocab)) * [[spread], [spread / 100], [0.5]]).astype(
        np.float32
    )
    kept = np.isfinite(np.asarray(top_p(jnp.asarray(logits), p)))
    for row in range(3):
        probs = softmax(logits[row])
        assert (kept[row] >= oracles.nucleus(probs, max(p - 1e-5, 1e-9))).all()
        assert (kept[row] <= oracles.nucleus(probs, p + 1e-5)).all()


@jax.jit
def top_p(logits: jax.Array, p: float) -> jax.Array:
    return TopP(p).filter(logits, None)


def test_top_p_reaches_beyond_the_few_it_looks_at_first():
    logits = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32) * 0.1
    kept = np.isfinite(np.asarray(top_p(jnp.asarray(logits), 0.9)))
    assert kept.sum(-1).min() > 800
    np.testing.assert_array_equal(kept, [oracles.nucleus(softmax(row), 0.9) for row in logits])


def test_top_p_of_one_keeps_all():
    logits = jnp.asarray([[0.0, -80.0, -200.0]])
    np.testing.assert_array_equal(TopP(1.0).filter(logits, None), logits)


def test_filters_keep_ties_and_greedy_takes_the_first():
    tied = jnp.asarray([[1.0, 2.0, 2.0, 0.0]])
    assert np.isfinite(np.asarray(TopP(0.1).filter(tied, None))).tolist() == [[False, True, True, False]]
    assert np.isfinite(np.asarray(MinP(1.0).filter(tied, None))).tolist() == [[False, True, True, False]]
    assert np.isfinite(np.asarray(TopK(3).filter(tied, None))).tolist() == [[True, True, True, False]]
    keys = jax.random.split(jax.random.key(0), 1)
    assert Greedy()(tied, keys, None).tolist() == TopK(1)(tied, keys, None).tolist() == [1]


@given(rows=st.integers(1, 19), vocab=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_the_likeliest_token_is_the_first_of_the_greatest(rows: int, vocab: int, seed: int):
    logits = np.random.default_rng(seed).integers(-3, 3, (rows, vocab)).astype(np.float32)  # ties everywhere
    logits[logits < -2] = -np.inf
    np.testing.assert_array_equal(likeliest(jnp.asarray(logits)), logits.argmax(-1))


@given(seed=st.integers(0, 999))
@settings(max_examples=10)
def test_top_1_is_greedy_even_among_equals(seed: int):
    logits = jnp.asarray(np.random.default_rng(seed).integers(0, 4, (8, VOCAB)).astype(np.float32))
    keys = jax.random.split(jax.random.key(seed), 8)
    np.testing.assert_array_equal(TopK(1)(logits, keys, None), Greedy()(logits, keys, None))


def test_a_penalty_falls_on_prompt_and_output():
    """Greedy with a penalty, replayed in NumPy over plain logits."""
    model, penalty, prompts = tiny.model(), 3.0, [[5], [9, 8, 7, 9]]
    out = qwen_eqx.generate(model, prompts, max_new_tokens=8, sampler=Chain(RepetitionPenalty(penalty), Greedy()))
    for row, prompt in enumerate(prompts):
        said = list(prompt)
        for _ in range(8):
            logits = oracles.decoder(model, said)[0][-1]
            past = np.isin(np.arange(97), said)
            logits = np.where(past, np.where(logits > 0, logits / penalty, logits * penalty), logits)
            said.append(int(logits.argmax()))
        assert np.asarray(out.tokens[row]).tolist() == said[len(prompt) :]


BAD = {
    "temperature 0": lambda: Temperature(0.0), "temperature below 0": lambda: Temperature(-1),
    "temperature nan": lambda: Temperature(float("nan")), "k 0": lambda: TopK(0), "p 0": lambda: TopP(0.0),
    "p above 1": lambda: TopP(1.01), "min-p above 1": lambda: MinP(2), "penalty 0": lambda: RepetitionPenalty(0),
    "empty chain": lambda: Chain(), "greedy first": lambda: Chain(Greedy(), Temperature(1.0)),
    "penalty unseen": lambda: RepetitionPenalty(1.1).filter(jnp.zeros((1, 3)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_samplers_are_refused_in_one_line(name: str):
    with pytest.raises(InputError) as caught:
        BAD[name]()
    assert "\n" not in str(caught.value)
