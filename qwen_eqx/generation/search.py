"""Search over completions: beam search, and all completions of at least a given probability."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from qwen_eqx.errors import InputError, positive
from qwen_eqx.generation.engine import Generator
from qwen_eqx.generation.generate import prepare
from qwen_eqx.model.cache import KVCache
from qwen_eqx.model.qwen import Qwen

_NEVER = -1e9  # a score that no sequence has; transformers' choice


class SearchState(eqx.Module):
    """Running and finished sequences; slot for slot the cache holds the running ones."""

    cache: KVCache
    logits: Float32[Array, "slots vocab"]  # after each running sequence
    tokens: Int[Array, "slots new"]  # running
    scores: Float32[Array, " slots"]  # log-probability of each running sequence; _NEVER: vacant
    finished: Int[Array, "slots new"]
    finished_scores: Float32[Array, " slots"]  # in what the search ranks by; _NEVER: vacant
    finished_lengths: Int[Array, " slots"]
    step: Int[Array, ""]  # tokens chosen so far
    open: Bool[Array, ""]  # whether going on can change the result


class Found(eqx.Module):
    """Completions, best first."""

    tokens: tuple[Int32[np.ndarray, " _"], ...]  # the stop token included
    log_probs: Float32[np.ndarray, " found"]  # of whole completions; for beam search over length ** length_penalty


def beam_search(
    model: Qwen,
    prompt: Sequence[int],
    *,
    beams: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> Found:
    """The `beams` best completions by log p / length ** length_penalty (transformers' `_beam_search`, early_stopping=False).

    A completion ends with a stop token or at `max_new_tokens`. Candidates that end count only if among the best `beams` of
    their step; the search ends when no running beam, at its present length, scores above the worst finished one.
    """
    positive("beams", beams)
    generator, inputs = prepare(model, [prompt], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, samples=beams)
    if beams * 2 > model.config.vocab:
        raise InputError(f"beams: found {beams}, expected at most {model.config.vocab // 2}, half the vocabulary")
    return _found(_beam_search(model, generator, inputs["tokens"], inputs["lengths"], beams, float(length_penalty)))


def threshold_search(
    model: Qwen, prompt: Sequence[int], *, p: float, max_new_tokens: int, stop_tokens: Sequence[int] = ()
) -> Found:
    """Every completion of probability at least p, exactly: at any depth at most 1/p prefixes are that probable.

    So floor(1/p) slots hold all of them, whatever the model; a prefix below p is dropped, for it can only get less probable.
    A completion ends with a stop token or at `max_new_tokens`.
    """
    if not 0 < p <= 1:
        raise InputError(f"p: found {p}, expected a probability above 0 and at most 1")
    slots = int(1 / p + 1e-9)
    generator, inputs = prepare(model, [prompt], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, samples=slots)
    threshold = jnp.asarray(np.log(p), jnp.float32)
    return _found(_threshold_search(model, generator, inputs["tokens"], inputs["lengths"], slots, threshold))


@eqx.filter_jit
def _beam_search(
    model: Qwen,
    generator: Generator,
    tokens: Int[Array, "1 prompt"],
    lengths: Int[Array, " 1"],
    beams: int,
    length_penalty: float,
) -> SearchState:
    new = generator.settings.new
    kept = max(2, 1 + len(generator.settings.stop_tokens)) * beams  # enough that `beams` of them run on

    def normalized(scores: Float32[Array, " n"], length: Int[Array, ""]) -> Float32[Array, " n"]:
        return scores / length.astype(jnp.float32) ** length_penalty

    def step(state: SearchState) -> SearchState:
        candidates, scores, parents, ends = _expand(state, generator, kept)
        length = state.step + 1
        may_end = ends & (jnp.arange(kept) < beams) & (scores > _NEVER)
        ended = jnp.where(may_end, normalized(scores, length), _NEVER)
        finished, finished_scores, finished_lengths = _merge(state, candidates, ended, length)
        running, best = jax.lax.top_k(jnp.where(ends, _NEVER, scores), beams)
        state = _advance(model, state, candidates[best], running, parents[best], state.step)
        hopeful = normalized(running[:1], length)[0] > finished_scores.min()
        state = _with_finished(state, finished, finished_scores, finished_lengths)
        return eqx.tree_at(lambda s: s.open, state, (length < new) & hopeful)

    state = _start(model, generator, tokens, lengths, beams)
    return jax.lax.while_loop(lambda s: s.open, step, state)


@eqx.filter_jit
def _threshold_search(
    model: Qwen,
    generator: Generator,
    tokens: Int[Array, "1 prompt"],
    lengths: Int[Array, " 1"],
    slots: int,
    threshold: Float32[Array, ""],
) -> SearchState:
    new = generator.settings.new

    def step(state: SearchState) -> SearchState:
        candidates, scores, parents, ends = _expand(state, generator, slots)
        probable = scores >= threshold
        ended = jnp.where(ends & probable, scores, _NEVER)
        merged = _merge(state, candidates, ended, state.step + 1)
        running = jnp.where(probable & ~ends, scores, _NEVER)
        state = _with_finished(_advance(model, state, candidates, running, parents, state.step), *merged)
        more = (running > _NEVER).any() & (state.step < new)
        return eqx.tree_at(lambda s: s.open, state, more)

    state = _start(model, generator, tokens, lengths, slots)
    return jax.lax.while_loop(lambda s: s.open, step, state)


def _start(
    model: Qwen, generator: Generator, tokens: Int[Array, "1 prompt"], lengths: Int[Array, " 1"], slots: int
) -> SearchState:
    prompt = generator.read(model, tokens, lengths)

    def repeat(leaf: Array) -> Array:
        return jnp.repeat(leaf, slots, axis=0) if leaf.ndim else leaf

    empty = jnp.full((slots, generator.settings.new), generator.settings.pad_token, jnp.int32)
    never = jnp.full(slots, _NEVER, jnp.float32)
    return SearchState(
        cache=jax.tree.map(repeat, prompt.cache),
        logits=repeat(prompt.logits),
        tokens=empty,
        scores=never.at[0].set(0.0),  # all slots hold the same prompt: one of them counts
        finished=empty,
        finished_scores=never,
        finished_lengths=jnp.zeros(slots, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        open=jnp.ones((), bool),
    )


def _expand(
    state: SearchState, generator: Generator, kept: int
) -> tuple[Int[Array, "kept new"], Float32[Array, " kept"], Int[Array, " kept"], Bool[Array, " kept"]]:
    """The best continuations by one token: their tokens, log-probabilities, parents, and whether they end here."""
    settings = generator.settings
    slots, vocab = state.logits.shape
    few = min(kept, vocab)
    best, ids = jax.lax.top_k(jax.nn.log_softmax(state.logits, axis=-1), few)  # no slot contributes more than `kept`
    total = jnp.where(state.scores[:, None] > _NEVER, state.scores[:, None] + best, _NEVER).reshape(-1)
    total = jnp.pad(total, (0, max(0, kept - total.shape[0])), constant_values=_NEVER)
    scores, chosen = jax.lax.top_k(total, kept)
    chosen = jnp.minimum(chosen, slots * few - 1)
    parents, token = chosen // few, ids.reshape(-1)[chosen]
    tokens = state.tokens[parents].at[:, state.step].set(token)
    ends = jnp.full(kept, False) | (state.step + 1 >= settings.new)
    for stop in settings.stop_tokens:
        ends |= token == stop
    return tokens, scores, parents, ends


def _advance(
    model: Qwen,
    state: SearchState,
    tokens: Int[Array, "slots new"],
    scores: Float32[Array, " slots"],
    parents: Int[Array, " slots"],
    column: Int[Array, ""],
) -> SearchState:
    """The chosen sequences take over the slots, cache rows and all, and the model reads their last tokens."""
    cache = jax.tree.map(lambda leaf: leaf[parents] if leaf.ndim else leaf, state.cache)
    last = jax.lax.dynamic_slice_in_dim(tokens, column, 1, axis=1)
    x, cache = model.forward(last, cache.length, cache)
    return SearchState(
        cache,
        model.logits(x[:, 0]),
        tokens,
        scores,
        state.finished,
        state.finished_scores,
        state.finished_lengths,
        state.step + 1,
        state.open,
    )


def _merge(
    state: SearchState, tokens: Int[Array, "kept new"], scores: Float32[Array, " kept"], length: Int[Array, ""]
) -> tuple[Int[Array, "slots new"], Float32[Array, " slots"], Int[Array, " slots"]]:
    """The best of the finished sequences and of those that finish now."""
    every = jnp.concatenate([state.finished_scores, scores])
    best, chosen = jax.lax.top_k(every, state.finished_scores.shape[0])
    lengths = jnp.concatenate([state.finished_lengths, jnp.full(scores.shape, length, jnp.int32)])
    return jnp.concatenate([state.finished, tokens])[chosen], best, lengths[chosen]


def _with_finished(
    state: SearchState,
    finished: Int[Array, "slots new"],
    scores: Float32[Array, " slots"],
    lengths: Int[Array, " slots"],
) -> SearchState:
    where = lambda s: (s.finished, s.finished_scores, s.finished_lengths)  # noqa: E731
    return eqx.tree_at(where, state, (finished, scores, lengths))


def _found(state: SearchState) -> Found:
    scores, lengths = np.asarray(state.finished_scores), np.asarray(state.finished_lengths)
    tokens = np.asarray(state.finished)
    real = [row for row in range(len(scores)) if scores[row] > _NEVER]
    return Found(tuple(tokens[row, : lengths[row]] for row in real), scores[real])
