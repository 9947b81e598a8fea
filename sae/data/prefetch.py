"""Batches that are ready before they are asked for: read and put on the device by a thread, a few ahead."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import jax
import numpy as np

from sae.errors import InputError

Batch = TypeVar("Batch")
_WAKES = 0.1  # seconds after which a waiting thread looks whether anybody still wants its batches


def to_device(batch: Batch) -> Batch:
    """Every NumPy array in a tree as one of the default device's; everything else as it is."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)


def prefetched(batches: Iterable[Batch], ahead: int = 2, place: Callable[[Batch], Any] = to_device) -> Iterator[Any]:
    """`place(batch)` of each, in order, at most `ahead` of them waiting; what fails in the thread is raised here."""
    if ahead < 1:
        raise InputError(f"ahead: found {ahead}, expected at least 1")
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
    unwanted = threading.Event()

    def hand_over(kind: str, value: Any) -> None:
        while not unwanted.is_set():
            with suppress(queue.Full):
                return ready.put((kind, value), timeout=_WAKES)

    def work() -> None:
        try:
            for batch in batches:
                if unwanted.is_set():
                    return
                hand_over("batch", place(batch))
        except BaseException as error:
            hand_over("error", error)
        else:
            hand_over("end", None)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        unwanted.set()
        thread.join()
