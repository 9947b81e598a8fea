"""Many prompts through few slots: a slot is refilled as soon as its sequence ends.

All rows share one write index into the ring of cache entries; a new prompt is laid down so that it ends where the index
stands, whatever the other rows are doing, so that each step remains one slice update for the whole batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, PRNGKeyArray

from qwen_eqx.errors import InputError, positive
from qwen_eqx.generation.engine import GenerationState, Generator, PromptState
from qwen_eqx.generation.generate import (
    PREFILL_CHUNK,
    make_settings,
    memory_plan,
    prompt_rows,
    prompt_width,
    row_keys,
)
from qwen_eqx.generation.memory import free_device_bytes
from qwen_eqx.generation.sample import AbstractSampler, Greedy, needs_seen
from qwen_eqx.model.cache import KVCache
from qwen_eqx.model.edits import AbstractEdit, resolve_edits
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import Capture
from qwen_eqx.text.ids import pad_left


class Completion(NamedTuple):
    """One finished sequence. Activations stay on the device, in buffers of fixed size: the first `length` columns count."""

    item: int  # the prompt's place in the input
    sample: int
    prompt_length: int
    length: int
    tokens: Int32[np.ndarray, " length"]
    log_probs: Float32[np.ndarray, " length"]
    activations: Float[Array, "sites new d_model"] | None
    prompt_activations: Float[Array, "sites prompt d_model"] | None  # right-aligned; 0 at pads


def schedule(
    model: Qwen,
    prompts: Iterable[Sequence[int]],
    *,
    slots: int,
    max_new_tokens: int,
    max_prompt_tokens: int | None = None,
    order: Literal["finished", "arrival"] = "finished",
    sampler: AbstractSampler = Greedy(),  # noqa: B008
    stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    limits: Sequence[int] | None = None,
    capture: Capture | None = None,
    edits: Sequence[AbstractEdit] = (),
    key: PRNGKeyArray | None = None,
    samples: int = 1,
    items: Sequence[int] | None = None,
    pad_token: int | None = None,
    cache_dtype: DTypeLike | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Callable[[Completion], None] | None = None,
) -> Iterator[Completion]:
    """Completes any number of prompts with the results that `generate` gives each of them alone.

    Yields completions as they finish, or in order of arrival; then nothing is begun more than 4 · slots sequences ahead of
    the oldest unfinished one, so memory stays bounded. `prompts` may be endless if `max_prompt_tokens` bounds their length.
    `limits[item]` lowers `max_new_tokens` for single prompts; `items[item]` is the number that its draws depend on (default:
    its place, as in `generate`). `progress` is called with every completion.
    """
    positive("slots", slots)
    positive("max_new_tokens", max_new_tokens)
    positive("samples", samples)
    if order not in ("finished", "arrival"):
        raise InputError(f"order: found {order!r}, expected 'finished' or 'arrival'")
    if max_prompt_tokens is None:
        if not isinstance(prompts, Sized):
            raise InputError("max_prompt_tokens: missing, expected a number when the prompts come one by one")
        prompts = prompt_rows(list(prompts), model.config, max_new_tokens, pad_token)
        max_prompt_tokens = max(map(len, prompts), default=1)
    width = prompt_width(max_prompt_tokens, prefill_chunk)
    settings = make_settings(
        model,
        new=max_new_tokens,
        kv_seq=width + max_new_tokens,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        capture=capture,
        pad_token=pad_token,
        cache_dtype=cache_dtype,
        prefill_chunk=prefill_chunk,
    )
    memory_plan(model.config, settings, slots, width).check_fits(free_device_bytes())
    generator = Generator(sampler, resolve_edits(edits, model.config), settings)
    waiting = _arrivals(model, prompts, max_prompt_tokens, samples, max_new_tokens, limits, items)
    return _Slots(model, generator, slots, key).run(waiting, order, progress)


class _Arrival(NamedTuple):
    number: int  # in order of arrival, samples counted
    item: int
    sample: int
    prompt: list[int]
    limit: int
    keyed: int  # what its key is folded from


def _arrivals(
    model: Qwen,
    prompts: Iterable[Sequence[int]],
    longest: int,
    samples: int,
    max_new_tokens: int,
    limits: Sequence[int] | None,
    items: Sequence[int] | None,
) -> Iterator[_Arrival]:
    for item, prompt in enumerate(prompts):
        (row,) = prompt_rows([prompt], model.config, max_new_tokens, None, first=item)
        if len(row) > longest:
            raise InputError(f"prompts[{item}]: found {len(row)} tokens, expected at most max_prompt_tokens={longest}")
        limit = max_new_tokens if limits is None else min(int(limits[item]), max_new_tokens)
        positive(f"limits[{item}]", limit)
        keyed = item if items is None else int(items[item])
        if not 0 <= keyed < 2**32:
            raise InputError(f"items[{item}]: found {keyed}, expected a number from 0 to 2^32 - 1")
        for sample in range(samples):
            yield _Arrival(item * samples + sample, item, sample, row, limit, keyed)


class _Slots:
    """The slots' state on the device, and who sits in them."""

    def __init__(self, model: Qwen, generator: Generator, slots: int, key: PRNGKeyArray | None):
        self.model, self.generator, self.key = model, generator, key
        self.seats: list[tuple[_Arrival, PromptState] | None] = [None] * slots
        self.state = _vacant(model, generator, slots)
        self.read: tuple[int, PromptState] | None = None  # the last prompt read: its samples share it

    def run(
        self, waiting: Iterator[_Arrival], order: str, progress: Callable[[Completion], None] | None
    ) -> Iterator[Completion]:
        begun, next_out, held = 0, 0, dict[int, Completion]()
        ahead = 4 * len(self.seats)
        queue = deque[_Arrival]()
        while True:
            for seat, taken in enumerate(self.seats):
                if taken is None and (order == "finished" or begun - next_out < ahead):
                    arrival = queue.popleft() if queue else next(waiting, None)
                    if arrival is None:
                        break
                    self._seat(seat, arrival)
                    begun += 1
            if all(taken is None for taken in self.seats):
                break
            done = np.asarray(self.state.done)
            if not any(taken is not None and done[seat] for seat, taken in enumerate(self.seats)):
                self.state = _run((self.model, self.generator), self.state)
                done = np.asarray(self.state.done)
            for seat, taken in enumerate(self.seats):
                if taken is not None and done[seat]:
                    completion = self._leave(seat, *taken)
                    if progress is not None:
                        progress(completion)
                    held[taken[0].number] = completion
            if order == "finished":
                next_out += len(held)
                yield from held.values()
                held.clear()
            while next_out in held:
                yield held.pop(next_out)
                next_out += 1

    def _seat(self, seat: int, arrival: _Arrival) -> None:
        if self.read is None or self.read[0] != arrival.item:
            chunk = self.generator.settings.prefill_chunk
            width = prompt_width(len(arrival.prompt), chunk)
            width = min(width, self.generator.settings.kv_seq - self.generator.settings.new)
            tokens = jnp.asarray(pad_left([arrival.prompt], width, self.generator.settings.pad_token))
            length = jnp.asarray([len(arrival.prompt)], jnp.int32)
            self.read = arrival.item, _read(self.model, self.generator, tokens, length)
        prompt = self.read[1]
        key = row_keys(self.key, np.asarray([arrival.keyed]), np.asarray([arrival.sample]))
        place = jnp.asarray(seat, jnp.int32), jnp.asarray(arrival.limit, jnp.int32)
        self.state = _admit((self.model, self.generator, prompt, key, *place), self.state)
        self.seats[seat] = arrival, prompt

    def _leave(self, seat: int, arrival: _Arrival, prompt: PromptState) -> Completion:
        tokens, log_probs, activations, length = _harvest(self.state, jnp.asarray(seat, jnp.int32))
        self.seats[seat] = None
        count = int(length)
        kept = None if prompt.activations is None else prompt.activations[:, 0]
        return Completion(
            arrival.item,
            arrival.sample,
            len(arrival.prompt),
            count,
            np.asarray(tokens)[:count],
            np.asarray(log_probs)[:count],
            activations,
            kept,
        )


def _vacant(model: Qwen, generator: Generator, slots: int) -> GenerationState:
    settings = generator.settings
    cache = KVCache.init(model.config, batch=slots, kv_seq=settings.kv_seq, dtype=settings.cache_dtype)
    seen = None
    if needs_seen(generator.sampler):
        seen = jnp.zeros((slots, model.config.vocab), bool)
    keys = row_keys(None, np.zeros(slots, np.int64), np.zeros(slots, np.int64))
    state = generator.empty(model, cache, jnp.zeros(slots, jnp.int32), keys, seen)
    return eqx.tree_at(lambda s: s.column, state, jnp.ones((), jnp.int32))  # a first token goes one column back


@eqx.filter_jit
def _read(model: Qwen, generator: Generator, tokens: Int[Array, "1 prompt"], lengths: Int[Array, " 1"]) -> PromptState:
    return generator.read(model, tokens, lengths)


Admission = tuple[Qwen, Generator, PromptState, Key[Array, " 1"], Int[Array, ""], Int[Array, ""]]


@eqx.filter_jit(donate="all-except-first")
def _admit(what: Admission, state: GenerationState) -> GenerationState:
    """Lays a prompt down in a row so that it ends at the write index, and its first token in the column just written."""
    model, generator, prompt, keys, seat, limit = what
    one = generator.begin(model, prompt, keys)
    back = state.cache.index - one.cache.index
    column = state.column - one.column

    def place(rows: Array, part: Array, *, by: Int[Array, ""] = column, axis: int = 0, along: int = 1) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, jnp.roll(part, by, axis=along), seat, axis=axis)

    layers = jax.tree.map(lambda rows, part: place(rows, part, by=back, along=2), state.cache.layers, one.cache.layers)
    cache = KVCache(layers, state.cache.index, state.cache.length.at[seat].set(one.cache.length[0]))

    def put(rows: Array, part: Array) -> Array:
        return rows.at[seat].set(part[0])

    return GenerationState(
        cache=cache,
        token=put(state.token, one.token),
        tokens=place(state.tokens, one.tokens),
        log_probs=place(state.log_probs, one.log_probs),
        buffer=jax.tree.map(lambda rows, part: place(rows, part, axis=1, along=2), state.buffer, one.buffer),
        seen=None if state.seen is None or one.seen is None else put(state.seen, one.seen),
        column=state.column,
        first=state.first.at[seat].set(column),
        length=put(state.length, one.length),
        limit=state.limit.at[seat].set(limit),
        done=state.done.at[seat].set(one.done[0] | (one.length[0] >= limit)),
        prompt_length=put(state.prompt_length, one.prompt_length),
        keys=put(state.keys, one.keys),
    )


@eqx.filter_jit(donate="all-except-first")
def _run(what: tuple[Qwen, Generator], state: GenerationState) -> GenerationState:
    """Steps until a row that was running is done."""
    model, generator = what
    idle = state.done

    def more(state: GenerationState) -> Bool[Array, ""]:
        return ~(state.done & ~idle).any()

    return jax.lax.while_loop(more, lambda s: generator.step(model, s), state)


@jax.jit
def _harvest(state: GenerationState, seat: Int[Array, ""]):
    """A row's tokens, log-probabilities, activations and length, column 0 first."""
    back = -state.first[seat]
    buffer = jax.tree.map(lambda stored: jnp.roll(stored[:, seat], back, axis=1), state.buffer)
    return (
        jnp.roll(state.tokens[seat], back),
        jnp.roll(state.log_probs[seat], back),
        None if buffer is None else buffer.values,
        state.length[seat],
    )
