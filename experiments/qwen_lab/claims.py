"""One run at a time at a URL: a mark that only one can create, and that its run writes again while it lives.

No clock is compared, and nothing but the storage is shared. Who finds a mark watches it: a run's changes every BEAT seconds,
and where it does not for PATIENCE the run is dead. Marks are numbered; of those who want the next number one creates it.
"""

import dataclasses
import json
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import sae
from qwen_lab import cli, locks, stopping
from qwen_lab.errors import RunError
from qwen_lab.locks import Share
from sae import storage
from sae.storage import Place

BEAT, PATIENCE = 10.0, 30.0  # seconds
NAME = re.compile(
    r"\.(running|turn)(?:-(\d+)-of-(\d+))?\.(\d{6})\.tmp"
)  # temporary files of a store's, as locks.NAME is


@dataclasses.dataclass(frozen=True)
class Mark:
    """What somebody wrote to say that it is at work."""

    kind: str
    share: Share | None
    number: int
    data: bytes = b""

    @property
    def name(self) -> str:
        return f".{self.kind}{'' if self.share is None else self.share.suffix}.{self.number:06d}.tmp"

    @property
    def said(self) -> dict[str, object]:
        return locks.read_mark(self.data)

    def excludes(self, other: "Mark") -> bool:
        """Whether the two may not be at work at once: they may with different ones of as many shares."""
        apart = self.share and other.share and self.share.of == other.share.of and self.share != other.share
        return self.kind == other.kind and not apart

    @property
    def surely_dead(self) -> bool:
        """Whether it is of this machine, where its process would be seen, and is not."""
        here = _machine()
        return here is not None and self.said.get("machine") == here and not locks.lives(self.said.get("pid"))


@contextmanager
def claimed(home: Path | str, share: Share | None = None) -> Iterator[None]:
    """Keeps other runs away from a URL, as `locks.claimed` does from a directory; a path has nothing to be kept from."""
    if isinstance(home, Path):
        yield
        return
    with _Claim(storage.place(home), Mark("running", share, 0)):
        yield


@contextmanager
def turn(home: Path | str) -> Iterator[None]:
    """Runs that share a URL are in this with block one after the other."""
    if isinstance(home, Path):
        yield
        return
    with _Claim(storage.place(home), Mark("turn", None, 0), wait=True):
        yield


class _Claim:
    """A mark that is written again and again by a thread."""

    def __init__(self, home: Place, wanted: Mark, wait: bool = False):
        self.home, self.wanted, self.wait = home, wanted, wait
        said = {**locks.new_mark(wanted.share), "machine": _machine(), "id": uuid.uuid4().hex, "beat": 0}
        self.said, self.ended = said, threading.Event()
        self.thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> None:
        dead: set[Mark] = set()
        while True:
            others = self._others() - dead
            if others:
                dead |= self._watched(others, dead)
            elif self._create(dead):
                break
        for mark in dead:
            (self.home / mark.name).remove()
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join(BEAT)
        with suppress(OSError):  # a mark that stays is soon a dead one's
            (self.home / self.mark.name).remove()

    def _others(self) -> set[Mark]:
        """The marks that exclude ours."""
        found = {mark for mark in _marks(self.home) if mark.excludes(self.wanted)}
        return {mark for mark in found if mark.said.get("id") != self.said["id"]}

    def _watched(self, marks: set[Mark], dead: set[Mark]) -> set[Mark]:
        """Those that are dead, after as long as that takes; raises for one that lives. Those in `dead` are known to be."""
        if found := {mark for mark in marks if mark.surely_dead}:
            return found
        end = time.monotonic() + PATIENCE
        if not self.wait:
            cli.console.print(f"{self.home}: looking whether another run is at work there, for {PATIENCE:g} s at most")
        while time.monotonic() < end:
            time.sleep(BEAT / 10)
            now = self._others() - dead
            if not self.wait and (living := now - marks):
                raise locks.taken(str(self.home), living.pop().said)
            if now != marks:
                return set()
        return marks

    def _create(self, dead: set[Mark]) -> bool:
        """Whether our mark stands, and nobody's whom we have not seen."""
        self.mark = dataclasses.replace(self.wanted, number=1 + max((mark.number for mark in dead), default=0))
        try:
            (self.home / self.mark.name).create(self._data())
        except sae.InputError:  # somebody else's is there
            return False
        if self._others() - dead:  # whoever came since is seen here, or sees ours
            (self.home / self.mark.name).remove()
            time.sleep(BEAT / 10 * random.random())
            return False
        return True

    def _data(self) -> bytes:
        return json.dumps(self.said).encode()

    def _keep(self) -> None:
        while not self.ended.wait(BEAT):
            with suppress(Exception):  # a store that cannot be reached ends the run where it writes
                if other := self._lost():
                    who = locks.taken(str(self.home), other.said)
                    stopping.fail(
                        RunError(f"this run was taken for dead, for it said nothing in {PATIENCE:g} s: {who}")
                    )
                    return
                self.said["beat"] += 1
                (self.home / self.mark.name).put(self._data())

    def _lost(self) -> Mark | None:
        """The mark of a run that went on in our place, if there is one."""
        return next((mark for mark in self._others() if mark.number > self.mark.number), None)


def _marks(home: Place) -> Iterator[Mark]:
    for name in home.sizes():
        if found := NAME.fullmatch(name):
            kind, *share, number = found.groups()
            with suppress(FileNotFoundError):  # its run has ended since
                data = (home / name).read()
                yield Mark(kind, Share(int(share[0]), int(share[1])) if share[0] else None, int(number), data)


def _machine() -> str | None:
    """What tells whether a process of the same number would be the same process; None where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
