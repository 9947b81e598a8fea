"""Many prompts through few slots: a slot is refilled as soon as its sequence ends.

All rows share one write index into the ring of cache entries; a new prompt is laid down so that it ends where the index
stands, whatever the other rows are doing, so that each step remains one slice update for the whole batch.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from qwen_eqx import sharding, shown
from qwen_eqx.errors import InputError, positive
from qwen_eqx.generation.buffer import ActivationBuffer
from qwen_eqx.generation.engine import GenerationState, Generator, PromptState
from qwen_eqx.generation.options import Options, by_keyword
from qwen_eqx.generation.prompts import prompt_rows, prompt_width
from qwen_eqx.generation.sample import needs_seen, row_keys
from qwen_eqx.generation.seats import Admission, Seats, admit
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
    """The slots' state on the devices, and whose sequence is in each; each group of a mesh's devices has as many."""

    def __init__(self, model: Qwen, generator: Generator, options: ScheduleOptions):
        self.model, self.generator, self.options = model, generator, options
        self.mesh = generator.settings.mesh
        slots = options.slots + sharding.rows_lacking(options.slots, self.mesh)
        self.groups = 1 if self.mesh is None else self.mesh.shape["data"]
        self.each = slots // self.groups
        # with what was captured at the prompts of all groups that were read together
        self.taken: list[tuple[_Arrival, Float[Array, "sites groups prompt d_model"] | None] | None] = [None] * slots
        self.state = _vacant(model, generator, slots)
        self.read: tuple[list[int], PromptState] | None = None  # the prompt each group read last: its samples share it

    def run(self, waiting: Iterator[_Arrival]) -> Iterator[Completion]:
        begun, next_out, held = 0, 0, dict[int, Completion]()
        in_order = self.options.order == "arrival"
        while True:
            begun += self._refill(waiting, 4 * len(self.taken) - (begun - next_out) if in_order else len(self.taken))
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

    def _refill(self, waiting: Iterator[_Arrival], most: int) -> int:
        """Begins at most so many sequences, one in each group of devices at a time: their prompts are read together."""
        begun = 0
        while True:
            slots = range(len(self.taken))
            free = {
                slot // self.each: slot for slot in reversed(slots) if self.taken[slot] is None
            }  # each group's first
            entering = dict(
                zip(sorted(free.values()), itertools.islice(waiting, min(len(free), most - begun)), strict=False)
            )
            if not entering:
                return begun
            self._enter(entering)
            begun += len(entering)

    def _enter(self, entering: dict[int, _Arrival]) -> None:
        """Of each group one slot at most; groups that have none free read the newest prompt along, whose samples follow."""
        rows = [next(reversed(entering.values()))] * self.groups
        slots, enters = np.zeros(self.groups, np.int32), np.zeros(self.groups, bool)
        for slot, arrival in entering.items():
            group, slots[group], enters[group] = slot // self.each, slot % self.each, True
            rows[group] = arrival
        items = [row.item for row in rows]
        if self.read is None or any(enters & (np.asarray(self.read[0]) != items)):
            self.read = items, self._read([row.prompt for row in rows])
        prompt = self.read[1]
        keys = row_keys(self.options.key, np.asarray([r.keyed for r in rows]), np.asarray([r.sample for r in rows]))
        seats = Seats(slots, np.asarray([row.limit for row in rows], np.int32), enters)
        seats = sharding.place_rows(jax.tree.map(jnp.asarray, seats), self.mesh)
        self.state = admit(Admission(self.model, self.generator, prompt, keys, seats), self.state)
        for slot, arrival in entering.items():
            self.taken[slot] = arrival, prompt.activations

    def _read(self, prompts: list[list[int]]) -> PromptState:
        settings = self.generator.settings
        width = min(prompt_width(max(map(len, prompts)), settings.prefill_chunk), settings.kv_seq - settings.new)
        tokens = jnp.asarray(pad_left(prompts, width, settings.pad_token))
        lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
        return _read(self.model, self.generator, *sharding.place_rows((tokens, lengths), self.mesh))

    def _finished(self) -> Iterator[tuple[int, Completion]]:
        """Runs until there is a finished sequence, and takes all there are out of their slots."""
        done = np.asarray(self.state.done)
        if not any(taken is not None and done[slot] for slot, taken in enumerate(self.taken)):
            self.state = _run(_Program(self.model, self.generator), self.state)
            done = np.asarray(self.state.done)
        for slot, taken in enumerate(self.taken):
            if taken is not None and done[slot]:
                yield taken[0].number, self._leave(slot, *taken)

    def _leave(
        self, slot: int, arrival: _Arrival, prompts: Float[Array, "sites groups prompt d_model"] | None
    ) -> Completion:
        row = self._harvested(slot)
        self.taken[slot] = None
        length = int(row.length)
        if prompts is not None:
            prompts, group = sharding.of_holder(prompts, slot // self.each, self.mesh, axis=1)
            prompts = prompts[:, group]
        return Completion(
            arrival.item,
            arrival.sample,
            len(arrival.prompt),
            length,
            np.asarray(row.tokens)[:length],
            np.asarray(row.log_probs)[:length],
            row.activations,
            prompts,
        )

    def _harvested(self, slot: int) -> "_Row":
        """A slot's sequence, on the device that generated it."""
        mesh, state = self.mesh, self.state
        columns = _Columns(state.tokens, state.log_probs, state.first, state.length)
        held, place = sharding.of_holder(columns, slot, mesh)
        buffer = state.buffer
        if buffer is not None:
            buffer, _ = sharding.of_holder(buffer, slot, mesh, axis=buffer.rows_axis)
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
def _read(
    model: Qwen, generator: Generator, tokens: Int[Array, "groups prompt"], lengths: Int[Array, " groups"]
) -> PromptState:
    return generator.read(model, tokens, lengths)


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
    return _Row(
        jnp.roll(columns.tokens[slot], back),
        jnp.roll(columns.log_probs[slot], back),
        None if buffer is None else buffer.row(slot, back),
        columns.length[slot],
    )
