"""Where SAE training gets its rows from: a model that generates or reads now, or the shards of an earlier run.

All give the same `Group`s: a few test inputs' activations, item after item and position after position, on the device.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import qwen_eqx
import sae
from qwen_eqx import sharding
from qwen_eqx.text.ids import bucket
from qwen_lab import completions
from qwen_lab.errors import InputError
from qwen_lab.passages import Corpus, Index, Passage
from qwen_lab.prompts import Item
from qwen_lab.reading import Reader
from qwen_lab.seen import Seen
from sae.data import buffer


@dataclasses.dataclass(frozen=True)
class Group:
    """Activations of a few items, at every site in one row; where `valid` is False a row is padding."""

    rows: Float[Array, "rows sites d_model"]
    valid: Bool[Array, " rows"]

    @classmethod
    def of(cls, rows: Float[Array, "rows *sites d_model"]) -> "Group":
        """Rows of one site or several, all of them valid."""
        return cls(rows if rows.ndim == 3 else rows[:, None], jnp.ones(rows.shape[0], bool))


jax.tree_util.register_dataclass(Group, data_fields=["rows", "valid"], meta_fields=[])


@runtime_checkable
class Source(Protocol):
    """Groups by number, `training` of them; those after are held out, and of tasks that training never sees."""

    sites: tuple[str, ...]
    d_model: int
    dtype: jnp.dtype
    training: int
    held_out: int
    held_out_tasks: tuple[str, ...]
    tasks_read: int  # held-out ones included
    positions: str  # which positions of an item are rows: all, or generated
    largest: int  # rows a group may bring at most
    seen: Seen  # its items; none of what is meant to change under a run
    flags: str  # that name what is read

    def group(self, number: int) -> Group: ...


class Live:
    """Groups made by a model that continues prompts, one pass for all sites; they never leave its device."""

    flags = "--data, --tasks"

    def __init__(
        self,
        model: qwen_eqx.Qwen,
        tokenizer: qwen_eqx.Tokenizer,
        items: Sequence[Item],
        *,
        held_out: int,
        sites: tuple[str, ...],
        prompts: int,
        max_new_tokens: int,
    ):
        self.sites, self.d_model, self.dtype = sites, model.config.d_model, jnp.dtype(model.dtype)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.capture = qwen_eqx.Capture(sites=sites, positions="all")
        self.capture.resolve(model.config)  # raises now for a site that cannot be captured
        tasks = [item.task.id for item in items]
        first, self.held_out_tasks = split(tasks, held_out)
        self.tasks_read, self.positions = len(set(tasks)), "all"
        self.seen = Seen()
        for item in items:
            self.seen.add(item.tokens, item.task.id, item.test)
        self.groups = [items[part] for part in _parts(len(items), first, prompts)]
        self.training = len(list(_parts(first, first, prompts)))
        self.held_out = len(self.groups) - self.training
        self.largest = max(sum(len(item.tokens) + max_new_tokens for item in group) for group in self.groups)

    def group(self, number: int) -> Group:
        """The activations at every position read: the prompt's, and each generated token's but the last."""
        items = self.groups[number]
        prompts = [item.tokens for item in items]
        out = completions.generate(self.model, self.tokenizer, prompts, self.max_new_tokens, capture=self.capture)
        assert out.prompt_activations is not None
        assert out.activations is not None
        return _flat(
            out.prompt_activations,
            out.activations,
            np.asarray([len(prompt) for prompt in prompts], np.int32),
            out.lengths,
        )


@jax.jit
def _flat(prompt: Array, generated: Array, prompt_lengths: Array, lengths: Array) -> Group:
    """One row per position: the prompt's last one produced token 0 and stands first among the generated."""
    sites, _, width, d_model = prompt.shape
    rows = jnp.concatenate([prompt[:, :, : width - 1], generated], axis=2)
    read = jnp.arange(width - 1)[None] >= width - prompt_lengths[:, None]
    wrote = jnp.arange(generated.shape[2])[None] < lengths[:, None]
    valid = jnp.concatenate([read, wrote], axis=1)
    return Group(jnp.moveaxis(rows, 0, 2).reshape(-1, sites, d_model), valid.reshape(-1))


class Forward:
    """Groups that a model reads at once, of given tokens; they never leave its device.

    The data are gone through once to count them, and are read again group by group: only what is held out is kept.
    """

    flags = "--data, --tasks"

    def __init__(self, model: qwen_eqx.Qwen, corpus: Corpus, *, held_out: int, sites: tuple[str, ...], prompts: int):
        self.sites, self.d_model, self.dtype = sites, model.config.d_model, jnp.dtype(model.dtype)
        self.model, self.corpus, self.prompts, self.positions = model, corpus, prompts, "all"
        self.places = qwen_eqx.Capture(sites=sites).resolve(model.config)
        last: collections.deque[tuple[str, list[list[int]]]] = collections.deque(maxlen=held_out)
        names, self.seen = 0, Seen()

        def seen(number: int, passage: Passage) -> None:
            nonlocal names
            self.seen.add(passage.tokens, passage.name)
            name = str(passage.said.get("task", passage.said.get("record")))
            if not last or last[-1][0] != name:
                names += 1
                last.append((name, []))
            last[-1][1].append(passage.tokens)

        self.index = Index.of(corpus, prompts, seen=seen)
        if not 1 <= held_out < names:
            raise InputError(
                f"--held-out: found {held_out}, expected 1 to {names - 1}: there are {names} tasks or documents"
            )
        self.tasks_read, self.held_out_tasks = names, tuple(name for name, _ in last)
        kept = [tokens for _, several in last for tokens in several]
        self.first = self.index.plan.items - len(kept)
        self.kept = [kept[part] for part in _parts(len(kept), 0, prompts)]
        self.training, self.held_out = -(-self.first // prompts), len(self.kept)
        self.largest = prompts * self._reader(1).width(self.index.longest)
        self.stream, self.next = iter(()), -1

    def group(self, number: int) -> Group:
        """The activations of a few passages, padded to the widest of them."""
        if number >= self.training:
            return self._read(self.kept[number - self.training])
        if number != self.next:
            self.stream = self.index.read(self.corpus, range(number, self.training))
        self.next = number + 1
        end = min((number + 1) * self.prompts, self.first)
        taken = itertools.islice(self.stream, end - number * self.prompts)
        return self._read([passage.tokens for _, passage in taken])

    def _reader(self, width: int) -> Reader:
        return Reader(self.model, self.places, self.prompts * width)

    def _read(self, items: list[list[int]]) -> Group:
        width = self._reader(1).width(max(1, *map(len, items), 1))
        out = self._reader(width).start([tokens or [0] for tokens in items], width)
        lengths = [len(tokens) for tokens in items] + [0] * (self.prompts - len(items))
        return _stacked(out.values, np.asarray(lengths, np.int32))


@jax.jit
def _stacked(values: tuple[Array, ...], lengths: Array) -> Group:
    rows = jnp.stack(values, axis=2)
    valid = jnp.arange(rows.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return Group(rows.reshape(-1, *rows.shape[2:]), valid.reshape(-1))


class Stored:
    """Groups read back from a store that `extract.py` wrote, as many items at a time as the live run has prompts."""

    flags = "--store"

    def __init__(
        self,
        store: sae.ActivationStore,
        *,
        held_out: int,
        sites: tuple[str, ...],
        prompts: int,
        partial: bool = False,  # whether a store that lacks shards is meant
    ):
        self.sites, self.d_model, self.dtype = sites, store.manifest.d_model, jnp.dtype(store.manifest.dtype)
        self.store = store.select(*sites)
        if not partial:
            try:
                store.expect_complete()
            except sae.InputError as error:
                raise InputError(f"{error}; --partial-store takes what is there") from None
        if not len(store):
            raise InputError(f"{store.directory}: found no committed rows, expected some to train on")
        spans, said = store.item_rows, store.items  # an item whose sidecar names no task is one by itself
        numbers = [number for number, rows in spans.items() if rows]
        tasks = [str(said[number].get("task", said[number].get("record", number))) for number in numbers]
        first, self.held_out_tasks = split(tasks, held_out)
        self.tasks_read, self.positions = len(set(tasks)), str(store.manifest.config.get("positions", "all"))
        self.seen = Seen()
        for number in () if partial else numbers:  # a part grows while it is read
            self.seen.add([], store.manifest.weights_digest, len(spans[number]), said[number])
        parts = [numbers[part] for part in _parts(len(numbers), first, prompts)]
        self.ranges = [(spans[part[0]].start, spans[part[-1]].stop) for part in parts]
        self.training = len(list(_parts(first, first, prompts)))
        self.held_out = len(parts) - self.training
        self.largest = max(end - start for start, end in self.ranges)
        self.reader = ThreadPoolExecutor(1, "store")
        self.ahead: dict[int, Future[Group]] = {}

    def group(self, number: int) -> Group:
        """The one asked for; the one that training asks for next is read while this one is worked on."""
        group = self.ahead.pop(number, None) or self.reader.submit(self._read, number)
        after = number + 1 if number + 1 not in (self.training, len(self.ranges)) else 0
        self.ahead = {after: self.reader.submit(self._read, after)}
        return group.result()

    def _read(self, number: int) -> Group:
        start, end = self.ranges[number]
        rows = np.asarray(self.store[start:end].activations)
        room = bucket(end - start)  # few shapes, so few compilations
        padded = np.zeros((room, *rows.shape[1:]), rows.dtype)
        padded[: end - start] = rows
        return Group(jnp.asarray(padded), jnp.arange(room) < end - start)


def split(tasks: Sequence[str], held_out: int) -> tuple[int, tuple[str, ...]]:
    """(items of the tasks to train on, the last `held_out` tasks): no task is on both sides."""
    names = list(dict.fromkeys(tasks))
    if not 1 <= held_out < len(names):
        raise InputError(f"--held-out: found {held_out}, expected 1 to {len(names) - 1}: there are {len(names)} tasks")
    kept_back = tuple(names[-held_out:])
    return next(index for index, task in enumerate(tasks) if task in kept_back), kept_back


def _parts(count: int, first: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, none of which crosses `first`."""
    for low, high in ((0, first), (first, count)):
        yield from (slice(at, min(at + size, high)) for at in range(low, high, size))


def wanted(group: Group, sink_times: float) -> Bool[Array, " rows"]:
    """The valid rows; if `sink_times` is above 0, without those whose norm at any site is over that many medians there."""
    return _wanted(group, sink_times) if sink_times else group.valid


@functools.partial(jax.jit, static_argnames="sink_times")
def _wanted(group: Group, sink_times: float) -> Array:
    # NaN rows count neither as rows nor in the median
    rows = jnp.where(group.valid[:, None, None], group.rows.astype(jnp.float32), jnp.nan)
    return jnp.all(jax.vmap(buffer.not_a_sink, (1, None), 1)(rows, sink_times), axis=1)


def held_out_rows(source: Source, sink_times: float) -> Float[Array, "rows sites d_model"]:
    """All wanted rows of the held-out tasks, on the device; only the mask is looked at by the host."""
    return rows_in(source, range(source.training, source.training + source.held_out), sink_times)


def rows_in(source: Source, groups: range, sink_times: float) -> Float[Array, "rows sites d_model"]:
    """As `held_out_rows`, of these groups."""
    parts = []
    for number in groups:
        group = sharding.here(source.group(number))  # of several processes each measures all
        places = np.flatnonzero(np.asarray(wanted(group, sink_times)))
        parts.append(group.rows[jnp.asarray(places)])
    return jnp.concatenate(parts)


def rows_of(source: Source, rows: int) -> str:
    """Which rows the metrics at the end of training are of."""
    wrote = (
        "what the model wrote" if source.positions == "generated" else "prompts with what the model wrote after them"
    )
    return f"all {rows:,} rows of {len(source.held_out_tasks)} held-out tasks: {wrote}"


def batches(rows: int, size: int = 4096) -> Iterator[slice]:
    """Slices of so many rows, in order."""
    for start in range(0, rows, size):
        yield slice(start, start + size)
