"""Search over completions: beam search, and all completions of at least a given probability."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from qwen_eqx import shown
from qwen_eqx.errors import InputError, positive
from qwen_eqx.generation.engine import Generator
from qwen_eqx.generation.generate import prepare
from qwen_eqx.generation.prompts import PromptBatch
from qwen_eqx.model.cache import KVCache
from qwen_eqx.model.qwen import Qwen

_NEVER = -1e9  # a score that no sequence has; transformers' choice


class Finished(eqx.Module):
    """The best sequences that ended."""

    tokens: Int[Array, "beams new"]
    scores: Float32[Array, " beams"]  # in what the search ranks by; _NEVER: vacant
    lengths: Int[Array, " beams"]


class SearchState(eqx.Module):
    """Running and finished sequences; row for row the cache holds the running ones, the beams."""

    cache: KVCache
    logits: Float32[Array, "beams vocab"]  # after each running sequence
    tokens: Int[Array, "beams new"]  # running
    scores: Float32[Array, " beams"]  # log-probability of each running sequence; _NEVER: vacant
    finished: Finished
    step: Int[Array, ""]  # tokens chosen so far
    open: Bool[Array, ""]  # whether going on can change the result


class Found(eqx.Module):
    """Completions, best first."""

    tokens: tuple[Int32[np.ndarray, " _"], ...]  # the stop token included
    log_probs: Float32[np.ndarray, " found"]  # of whole completions; for beam search over length ** length_penalty

    def __repr__(self) -> str:
        return shown.by_field(self)

    def _repr_html_(self) -> str:
        rows = [(row.tolist(), None, float(total)) for row, total in zip(self.tokens, self.log_probs, strict=True)]
        return shown.generated("Found", {"completions, best first": str(len(rows))}, rows)


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
    generator, batch = prepare(model, [prompt], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, samples=beams)
    if beams * 2 > model.config.vocab:
        raise InputError(f"beams: found {beams}, expected at most {model.config.vocab // 2}, half the vocabulary")
    return _completions(_beam_search(model, generator, batch, beams, float(length_penalty)))


def threshold_search(
    model: Qwen, prompt: Sequence[int], *, p: float, max_new_tokens: int, stop_tokens: Sequence[int] = ()
) -> Found:
    """Every completion of probability at least p, exactly: at any depth at most 1/p prefixes are that probable.

    So floor(1/p) beams hold all of them, whatever the model; a prefix below p is dropped, for it can only get less probable.
    A completion ends with a stop token or at `max_new_tokens`.
    """
    if not 0 < p <= 1:
        raise InputError(f"p: found {p}, expected a probability above 0 and at most 1")
    beams = int(1 / p + 1e-9)
    generator, batch = prepare(model, [prompt], max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, samples=beams)
    threshold = jnp.asarray(np.log(p), jnp.float32)
    return _completions(_threshold_search(model, generator, batch, beams, threshold))


@eqx.filter_jit
def _beam_search(
    model: Qwen, generator: Generator, batch: PromptBatch, beams: int, length_penalty: float
) -> SearchState:
    new = generator.settings.new
    kept = max(2, 1 + len(generator.settings.stop_tokens)) * beams  # enough that `beams` of them run on

    def normalized(scores: Float32[Array, " n"], length: Int[Array, ""]) -> Float32[Array, " n"]:
        return scores / length.astype(jnp.float32) ** length_penalty

    def step(state: SearchState) -> SearchState:
        best = _expand(state, generator, kept)
        length = state.step + 1
        may_end = best.ends & (jnp.arange(kept) < beams) & (best.scores > _NEVER)
        ended = jnp.where(may_end, normalized(best.scores, length), _NEVER)
        finished = _merge(state.finished, best.tokens, ended, length)
        running, chosen = jax.lax.top_k(jnp.where(best.ends, _NEVER, best.scores), beams)
        state = _advance(model, state, best.tokens[chosen], running, best.parents[chosen])
        hopeful = normalized(running[:1], length)[0] > finished.scores.min()
        return eqx.tree_at(lambda s: (s.finished, s.open), state, (finished, (length < new) & hopeful))

    return jax.lax.while_loop(lambda s: s.open, step, _start(model, generator, batch, beams))


@eqx.filter_jit
def _threshold_search(
    model: Qwen, generator: Generator, batch: PromptBatch, beams: int, threshold: Float32[Array, ""]
) -> SearchState:
    new = generator.settings.new

    def step(state: SearchState) -> SearchState:
        best = _expand(state, generator, beams)
        probable = best.scores >= threshold
        ended = jnp.where(best.ends & probable, best.scores, _NEVER)
        finished = _merge(state.finished, best.tokens, ended, state.step + 1)
        running = jnp.where(probable & ~best.ends, best.scores, _NEVER)
        state = _advance(model, state, best.tokens, running, best.parents)
        more = (running > _NEVER).any() & (state.step < new)
        return eqx.tree_at(lambda s: (s.finished, s.open), state, (finished, more))

    return jax.lax.while_loop(lambda s: s.open, step, _start(model, generator, batch, beams))


def _start(model: Qwen, generator: Generator, batch: PromptBatch, beams: int) -> SearchState:
    prompt = generator.read(model, batch.tokens, batch.lengths)

    def repeat(leaf: Array) -> Array:
        return jnp.repeat(leaf, beams, axis=0) if leaf.ndim else leaf

    empty = jnp.full((beams, generator.settings.new), generator.settings.pad_token, jnp.int32)
    never = jnp.full(beams, _NEVER, jnp.float32)
    return SearchState(
        cache=jax.tree.map(repeat, prompt.cache),
        logits=repeat(prompt.logits),
        tokens=empty,
        scores=never.at[0].set(0.0),  # all beams hold the same prompt: one of them counts
        finished=Finished(empty, never, jnp.zeros(beams, jnp.int32)),
        step=jnp.zeros((), jnp.int32),
        open=jnp.ones((), bool),
    )


class _Candidates(NamedTuple):
    """Beams continued by one token, best first."""

    tokens: Int[Array, "kept new"]
    scores: Float32[Array, " kept"]  # their log-probabilities
    parents: Int[Array, " kept"]  # the beams they continue
    ends: Bool[Array, " kept"]


def _expand(state: SearchState, generator: Generator, kept: int) -> _Candidates:
    """The best continuations by one token."""
    settings = generator.settings
    beams, vocab = state.logits.shape
    few = min(kept, vocab)
    best, ids = jax.lax.top_k(jax.nn.log_softmax(state.logits, axis=-1), few)  # no beam contributes more than `kept`
    total = jnp.where(state.scores[:, None] > _NEVER, state.scores[:, None] + best, _NEVER).reshape(-1)
    total = jnp.pad(total, (0, max(0, kept - total.shape[0])), constant_values=_NEVER)
    scores, chosen = jax.lax.top_k(total, kept)
    chosen = jnp.minimum(chosen, beams * few - 1)
    parents, token = chosen // few, ids.reshape(-1)[chosen]
    tokens = state.tokens[parents].at[:, state.step].set(token)
    ends = jnp.full(kept, False) | (state.step + 1 >= settings.new)
    for stop in settings.stop_tokens:
        ends |= token == stop
    return _Candidates(tokens, scores, parents, ends)


def _advance(
    model: Qwen,
    state: SearchState,
    tokens: Int[Array, "beams new"],
    scores: Float32[Array, " beams"],
    parents: Int[Array, " beams"],
) -> SearchState:
    """The chosen sequences become the beams, cache rows and all, and the model reads their last tokens."""
    cache = jax.tree.map(lambda leaf: leaf[parents] if leaf.ndim else leaf, state.cache)
    last = jax.lax.dynamic_slice_in_dim(tokens, state.step, 1, axis=1)
    x, cache = model.forward(last, cache.length, cache)
    return SearchState(cache, model.logits(x[:, 0]), tokens, scores, state.finished, state.step + 1, state.open)


def _merge(
    finished: Finished, tokens: Int[Array, "kept new"], scores: Float32[Array, " kept"], length: Int[Array, ""]
) -> Finished:
    """The best of the finished sequences and of those that finish now."""
    every = jnp.concatenate([finished.scores, scores])
    best, chosen = jax.lax.top_k(every, finished.scores.shape[0])
    lengths = jnp.concatenate([finished.lengths, jnp.full(scores.shape, length, jnp.int32)])
    return Finished(jnp.concatenate([finished.tokens, tokens])[chosen], best, lengths[chosen])


def _completions(state: SearchState) -> Found:
    finished = jax.tree.map(np.asarray, state.finished)
    real = [row for row, score in enumerate(finished.scores) if score > _NEVER]
    return Found(tuple(finished.tokens[row, : finished.lengths[row]] for row in real), finished.scores[real])
