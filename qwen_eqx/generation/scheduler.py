"""Many prompts through few slots: a slot is refilled as soon as its sequence ends.

All rows share one write index into the ring of cache entries; a new prompt is laid down so that it ends where the index
stands, whatever the other rows are doing, so that each step remains one slice update for the whole batch.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from qwen_eqx import sharding, shown
from qwen_eqx.errors import InputError, positive
from qwen_eqx.generation.buffer import ActivationBuffer
from qwen_eqx.generation.engine import GenerationState, Generator, PromptState
from qwen_eqx.generation.options import Options, by_keyword
from qwen_eqx.generation.prompts import prompt_rows, prompt_width
from qwen_eqx.generation.sample import needs_seen, row_keys
from qwen_eqx.model.cache import KVCache
from qwen_eqx.model.edits import resolve_edits
from qwen_eqx.model.qwen import Qwen
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

    def __repr__(self) -> str:
        return shown.by_field(self)

    def _repr_html_(self) -> str:
        facts = {name: getattr(self, name) for name in self._fields if name not in ("tokens", "log_probs")}
        log_probs = self.log_probs.tolist()
        return shown.generated("Completion", facts, [(self.tokens.tolist(), log_probs, float(np.sum(log_probs)))])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleOptions(Options):
    """The keywords of `schedule`: those of `generate`, and these."""

    slots: int
    """Sequences decoded together."""
    max_prompt_tokens: int | None = None
    """Of the longest prompt; needed where the prompts come one by one."""
    order: Literal["finished", "arrival"] = "finished"
    """In which completions are yielded."""
    limits: Sequence[int] | None = None
    """For each prompt, what lowers its `max_new_tokens`."""
    progress: Callable[[Completion], None] | None = None
    """Called with every completion."""


@by_keyword(ScheduleOptions)
def schedule(model: Qwen, prompts: Iterable[Sequence[int]], options: ScheduleOptions) -> Iterator[Completion]:
    """Completes any number of prompts with the results that `generate` gives each of them alone.

    Yields completions as they finish, or in order of arrival; then nothing is begun more than 4 · slots sequences ahead of
    the oldest unfinished one, so memory stays bounded. `prompts` may be endless if `max_prompt_tokens` bounds their length.
    `limits[item]` lowers `max_new_tokens` for single prompts; `items[item]` is the number that its draws depend on (default:
    its place, as in `generate`). `progress` is called with every completion. The keywords are the fields of
    `ScheduleOptions`.
    """
    positive("slots", options.slots)
    if options.order not in ("finished", "arrival"):
        raise InputError(f"order: found {options.order!r}, expected 'finished' or 'arrival'")
    longest = options.max_prompt_tokens
    if longest is None:
        if not isinstance(prompts, Sized):
            raise InputError("max_prompt_tokens: missing, expected a number when the prompts come one by one")
        prompts = prompt_rows(list(prompts), model.config, options.max_new_tokens, options.pad_token)
        longest = max(map(len, prompts), default=1)
    width = prompt_width(longest, options.prefill_chunk)
    resolve_edits(options.edits, model.config)  # a slot serves many prompts: no edit may differ by row
    generator = Generator.init(model, options, prompts=options.slots, width=width)
    return _Slots(model, generator, options).run(_arrivals(model, prompts, longest, options))


class _Arrival(NamedTuple):
    number: int  # in order of arrival, samples counted
    item: int
    sample: int
    prompt: list[int]
    limit: int
    keyed: int  # what its key is folded from


def _arrivals(
    model: Qwen, prompts: Iterable[Sequence[int]], longest: int, options: ScheduleOptions
) -> Iterator[_Arrival]:
    most = options.max_new_tokens
    for item, prompt in enumerate(prompts):
        (row,) = prompt_rows([prompt], model.config, most, first=item)
        if len(row) > longest:
            raise InputError(f"prompts[{item}]: found {len(row)} tokens, expected at most max_prompt_tokens={longest}")
        limit = most if options.limits is None else min(int(options.limits[item]), most)
        positive(f"limits[{item}]", limit)
        keyed = options.number(item)
        for sample in range(options.samples):
            yield _Arrival(item * options.samples + sample, item, sample, row, limit, keyed)


class _Slots:
    """The slots' state on the device, and whose sequence is in each."""

    def __init__(self, model: Qwen, generator: Generator, options: ScheduleOptions):
        self.model, self.generator, self.options = model, generator, options
        slots = options.slots + sharding.rows_lacking(options.slots, generator.settings.mesh)
        self.taken: list[tuple[_Arrival, PromptState] | None] = [None] * slots
        self.state = _vacant(model, generator, slots)
        self.read: tuple[int, PromptState] | None = None  # the last prompt read: its samples share it

    def run(self, waiting: Iterator[_Arrival]) -> Iterator[Completion]:
        begun, next_out, held = 0, 0, dict[int, Completion]()
        in_order = self.options.order == "arrival"
        while True:
            for slot, taken in enumerate(self.taken):
                if taken is None and (not in_order or begun - next_out < 4 * len(self.taken)):
                    arrival = next(waiting, None)
                    if arrival is None:
                        break
                    self._enter(slot, arrival)
                    begun += 1
            if all(taken is None for taken in self.taken):
                break
            for number, completion in self._finished():
                if self.options.progress is not None:
                    self.options.progress(completion)
                held[number] = completion
            if not in_order:
                next_out += len(held)
                yield from held.values()
                held.clear()
            while next_out in held:
                yield held.pop(next_out)
                next_out += 1

    def _enter(self, slot: int, arrival: _Arrival) -> None:
        settings = self.generator.settings
        if self.read is None or self.read[0] != arrival.item:
            width = min(prompt_width(len(arrival.prompt), settings.prefill_chunk), settings.kv_seq - settings.new)
            tokens = jnp.asarray(pad_left([arrival.prompt], width, settings.pad_token))
            length = jnp.asarray([len(arrival.prompt)], jnp.int32)
            self.read = arrival.item, _read(self.model, self.generator, tokens, length)
        prompt = self.read[1]
        key = row_keys(self.options.key, np.asarray([arrival.keyed]), np.asarray([arrival.sample]))
        place = jnp.asarray(slot, jnp.int32), jnp.asarray(arrival.limit, jnp.int32)
        self.state = _admit(_Admission(self.model, self.generator, prompt, key, *place), self.state)
        self.taken[slot] = arrival, prompt

    def _finished(self) -> Iterator[tuple[int, Completion]]:
        """Runs until there is a finished sequence, and takes all there are out of their slots."""
        done = np.asarray(self.state.done)
        if not any(taken is not None and done[slot] for slot, taken in enumerate(self.taken)):
            self.state = _run(_Program(self.model, self.generator), self.state)
            done = np.asarray(self.state.done)
        for slot, taken in enumerate(self.taken):
            if taken is not None and done[slot]:
                yield taken[0].number, self._leave(slot, *taken)

    def _leave(self, slot: int, arrival: _Arrival, prompt: PromptState) -> Completion:
        row = self._harvested(slot)
        self.taken[slot] = None
        length = int(row.length)
        return Completion(
            arrival.item,
            arrival.sample,
            len(arrival.prompt),
            length,
            np.asarray(row.tokens)[:length],
            np.asarray(row.log_probs)[:length],
            row.activations,
            None if prompt.activations is None else prompt.activations[:, 0],
        )

    def _harvested(self, slot: int) -> "_Row":
        """A slot's sequence, on the device that generated it."""
        mesh, state = self.generator.settings.mesh, self.state
        columns = _Columns(state.tokens, state.log_probs, state.first, state.length)
        held, place = sharding.of_holder(columns, slot, mesh)
        buffer = state.buffer
        if buffer is not None:
            buffer, _ = sharding.of_holder(buffer, slot, mesh, axis=1)
        return _harvest(held, buffer, np.int32(place))


@eqx.filter_jit
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


class _Admission(NamedTuple):
    """A prompt that was read, and the slot that its next sample gets."""

    model: Qwen
    generator: Generator
    prompt: PromptState
    key: Key[Array, " 1"]
    slot: Int[Array, ""]
    limit: Int[Array, ""]


@eqx.filter_jit(donate="all-except-first")
def _admit(admission: _Admission, state: GenerationState) -> GenerationState:
    """Lays a prompt down in a row so that it ends at the write index, and its first token in the column just written."""
    model, generator, prompt, key, slot, limit = admission
    one = generator.begin(model, prompt, key)
    back = state.cache.index - one.cache.index
    column = state.column - one.column

    def place(rows: Array, part: Array, *, by: Int[Array, ""] = column, axis: int = 0, along: int = 1) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, jnp.roll(part, by, axis=along), slot, axis=axis)

    layers = jax.tree.map(lambda rows, part: place(rows, part, by=back, along=2), state.cache.layers, one.cache.layers)
    cache = KVCache(layers, state.cache.index, state.cache.length.at[slot].set(one.cache.length[0]))

    def put(rows: Array, part: Array) -> Array:
        return rows.at[slot].set(part[0])

    admitted = GenerationState(
        cache=cache,
        token=put(state.token, one.token),
        tokens=place(state.tokens, one.tokens),
        log_probs=place(state.log_probs, one.log_probs),
        buffer=jax.tree.map(lambda rows, part: place(rows, part, axis=1, along=2), state.buffer, one.buffer),
        seen=None if state.seen is None or one.seen is None else put(state.seen, one.seen),
        column=state.column,
        first=state.first.at[slot].set(column),
        length=put(state.length, one.length),
        limit=state.limit.at[slot].set(limit),
        done=state.done.at[slot].set(one.done[0] | (one.length[0] >= limit)),
        prompt_length=put(state.prompt_length, one.prompt_length),
        keys=put(state.keys, one.keys),
    )
    return generator.dealt(admitted)


class _Program(NamedTuple):
    model: Qwen
    generator: Generator


@eqx.filter_jit(donate="all-except-first")
def _run(program: _Program, state: GenerationState) -> GenerationState:
    """Steps until a row that was running is done."""
    idle = state.done

    def more(state: GenerationState) -> Bool[Array, ""]:
        return ~(state.done & ~idle).any()

    return jax.lax.while_loop(more, lambda s: program.generator.step(program.model, s), state)


class _Row(NamedTuple):
    """One sequence, token 0 in column 0."""

    tokens: Int[Array, " new"]
    log_probs: Float32[Array, " new"]
    activations: Float[Array, "sites new d_model"] | None
    length: Int[Array, ""]


class _Columns(NamedTuple):
    """Of a `GenerationState` what is harvested beside activations."""

    tokens: Int[Array, "batch new"]
    log_probs: Float32[Array, "batch new"]
    first: Int[Array, " batch"]
    length: Int[Array, " batch"]


@jax.jit
def _harvest(columns: _Columns, buffer: ActivationBuffer | None, slot: Int[Array, ""]) -> _Row:
    back = -columns.first[slot]
    buffer = jax.tree.map(lambda stored: jnp.roll(stored[:, slot], back, axis=1), buffer)
    return _Row(
        jnp.roll(columns.tokens[slot], back),
        jnp.roll(columns.log_probs[slot], back),
        None if buffer is None else buffer.values,
        columns.length[slot],
    )
