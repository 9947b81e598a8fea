"""Shards on their way to a store: gathered from items in any order, written by a thread while others are computed."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import sae
from qwen_lab import stopping
from qwen_lab.meter import Meter

Item = Mapping[str, Any]
Write = Callable[[int, sae.Rows, Sequence[Item]], None]
LEFT_SECONDS = 15.0  # for what waits to be written when a run is stopped


class Shards:
    """Items come one after another, in any order; a shard is handed on as soon as it has all of its own."""

    def __init__(self, writer: sae.StoreWriter, shards: Sequence[int] | None = None, write: Write | None = None):
        self.writer = writer
        self.missing = set(writer.missing if shards is None else shards)
        self.write = write or writer.write_shard
        self.begun: dict[int, dict[int, tuple[sae.Rows, Item]]] = {}

    @property
    def committed_items(self) -> int:
        """Items before the first shard that is missing."""
        plan = self.writer.plan
        return plan.items_of(min(self.missing)).start if self.missing else plan.items

    def add(self, number: int, rows: sae.Rows, item: Item) -> None:
        """Item `number`; those of a shard that stands are passed over."""
        plan = self.writer.plan
        shard = number // plan.items_per_shard
        if shard not in self.missing:
            return
        held = self.begun.setdefault(shard, {})
        held[number] = rows, item
        planned = plan.items_of(shard)
        if len(held) == len(planned):
            parts, items = zip(*(held[each] for each in planned), strict=True)
            del self.begun[shard]
            self.missing.discard(shard)
            self.write(shard, sae.Rows.concatenate(parts), items)


class Background:
    """One thread that writes; `put` waits where `room` shards do already, and raises what went wrong with an earlier one.

    At the end what waits is written; after an error or a signal only what can be in a few seconds.
    """

    def __init__(self, write: Write, meter: Meter, room: int = 2):
        self._write, self._waiting = write, queue.Queue[tuple[int, sae.Rows, Sequence[Item]] | None](room)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None
        self.meter = meter

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def put(self, shard: int, rows: sae.Rows, items: Sequence[Item]) -> None:
        while True:
            self.check()
            stopping.check()
            try:
                return self._waiting.put((shard, rows, items), timeout=0.1)
            except queue.Full:
                continue

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.perf_counter() + LEFT_SECONDS
        while self._thread.is_alive() and self._error is None:
            try:
                self._waiting.put(None, timeout=0.1)
                break
            except queue.Full:
                if kind is not None and time.perf_counter() > end:
                    return  # the shard that is being written is whole or not there
        self._thread.join(None if kind is None else max(0.0, end - time.perf_counter()))
        if kind is None:
            self.check()

    def _run(self) -> None:
        while (taken := self._waiting.get()) is not None:
            begin = time.perf_counter()
            try:
                self._write(*taken)
            except BaseException as error:  # raised where the next shard is put, or at the end
                self._error = error
                return
            self.meter.add(shards=1)
            self.meter.writing += time.perf_counter() - begin
