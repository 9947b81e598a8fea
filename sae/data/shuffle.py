"""Every row of a store once, in a seeded order, from a few shards at a time, with a cursor that continues exactly.

    for rows, cursor in shuffled(store, 4096, seed=0):       # cursor: JSON, where the batch after this one begins
        ...
    for rows, cursor in shuffled(store, 4096, cursor=cursor):

The law: shards in an order drawn by (seed, epoch), `window` of them at a time, all rows of a window in an order drawn by
(seed, epoch, window). So an epoch is a permutation of the rows of the shards that were there when it began; two rows of
shards in different windows never stand in each other's place, and at most `window` shards (with the next window's, where
a batch crosses over) are open. The order depends on nothing else: not on NumPy's version, nor on the batch size.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sae.data.rows import Rows
from sae.data.store import ActivationStore
from sae.errors import InputError

_FIELDS = ("seed", "epoch", "window", "row", "shards")


class Shuffled(NamedTuple):
    """Rows, and the cursor of the batch that follows them."""

    rows: Rows
    cursor: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of one epoch over these shards, by their number and rows."""

    shards: tuple[tuple[int, int], ...]  # (where its rows begin in the store, rows)
    seed: int
    epoch: int
    window: int

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.shards)

    def from_row(self, start: int) -> Iterator[np.ndarray]:
        """Row numbers of the store, one window after another, from place `start` of the order on."""
        turn = permutation(len(self.shards), self.seed, self.epoch, -1)
        for number, first in enumerate(range(0, len(turn), self.window)):
            here = [self.shards[index] for index in turn[first : first + self.window]]
            count = sum(rows for _, rows in here)
            if start < count:
                rows = np.concatenate([np.arange(begin, begin + rows) for begin, rows in here])
                yield rows[permutation(count, self.seed, self.epoch, number)][start:]
            start = max(0, start - count)


def permutation(count: int, *seed: int) -> np.ndarray:
    """0 … count − 1 in the order of SplitMix64 of each, mixed with the seed (Steele, Lea, Flood 2014)."""
    mixed = np.zeros(1, np.uint64)
    for word in seed:
        mixed = _mix(mixed ^ np.array([word & (2**64 - 1)], np.uint64))
    return np.argsort(_mix(_mix(np.arange(count, dtype=np.uint64)) ^ mixed), kind="stable")


def _mix(words: np.ndarray) -> np.ndarray:
    words = words + np.uint64(0x9E3779B97F4A7C15)  # wraps around: arithmetic modulo 2⁶⁴
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def shuffled(
    store: ActivationStore,
    batch_size: int,
    *,
    seed: int = 0,
    window: int = 8,
    epochs: int | None = 1,
    cursor: dict[str, Any] | None = None,
) -> Iterator[Shuffled]:
    """Batches of `epochs` passes (None: without end), or from a `cursor` on, whose seed and window hold then.

    A batch never spans two epochs: the last of each may be short. A store that has grown is taken with its new shards
    from the next epoch on.
    """
    if min(batch_size, window) < 1:
        raise InputError(f"batch_size, window: found {batch_size}, {window}, expected at least 1")
    numbers = [shard.index for shard in store.shards]
    begin: dict[str, Any] = {"seed": seed, "epoch": 0, "window": window, "row": 0, "shards": numbers}
    at = begin if cursor is None else _read(cursor)
    while epochs is None or at["epoch"] < epochs:
        order = _order(store, at)
        after = at | {"epoch": at["epoch"] + 1, "row": 0, "shards": numbers}
        place = at["row"]
        for rows in _regrouped(order.from_row(place), batch_size):
            place += len(rows)
            yield Shuffled(store[rows], at | {"row": place} if place < order.rows else after)
        if not order.rows:
            return
        at = after


def _order(store: ActivationStore, cursor: dict[str, Any]) -> Order:
    begins = np.cumsum([0, *(shard.rows for shard in store.shards)]).tolist()
    places = {shard.index: (begin, shard.rows) for begin, shard in zip(begins, store.shards, strict=False)}
    if lost := [number for number in cursor["shards"] if number not in places]:
        raise InputError(f"{store.directory}: found no shards {lost!r:.80}, expected those of the cursor's epoch")
    shards = tuple(places[number] for number in cursor["shards"])
    return Order(shards, cursor["seed"], cursor["epoch"], cursor["window"])


def _read(cursor: dict[str, Any]) -> dict[str, Any]:
    """A cursor that came from somewhere."""
    whole = [cursor.get(name) for name in _FIELDS[:-1]]
    numbers = cursor.get("shards")
    if (
        any(type(value) is not int for value in whole)
        or not isinstance(numbers, list)
        or any(type(number) is not int for number in numbers)
        or min(cursor["epoch"], cursor["row"], cursor["window"] - 1) < 0
    ):
        raise InputError(f"cursor: found {cursor!r:.120}, expected {', '.join(_FIELDS)} as `shuffled` gave them")
    return {name: cursor[name] for name in _FIELDS}


def _regrouped(parts: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same numbers in groups of `size`, the last of them shorter."""
    held = np.empty(0, np.int64)
    for part in parts:
        held = np.concatenate([held, part])
        whole = len(held) - len(held) % size
        yield from (held[at : at + size] for at in range(0, whole, size))
        held = held[whole:]
    if len(held):
        yield held
