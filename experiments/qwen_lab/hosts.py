"""Several processes as one run: which of them this one is, and that all were told the same before any of them begins.

They meet at a socket of process 0's. JAX's own service would end them with a stack trace where one does not come, and once
they have met, each works for itself: whatever becomes of the others.
"""

import dataclasses
import functools
import json
import secrets
import socket
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qwen_lab.bounds import CountOrNone, WholeOrNone
from qwen_lab.errors import InputError, RunError
from sae import shown, storage

WAIT = 300.0  # seconds in which all have to come, and to answer
HELLO = 10.0  # until a process has said which it is
SEEN_AFTER = 30.0  # seconds until what one host wrote is there for another
TOKEN = ".hosts.tmp"  # as a store's temporary files are named
MOST_BYTES = 2**24  # of what one says


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfProcesses:
    """Which process of several this one is."""

    coordinator: str | None = None
    """Address host:port of process 0, where several processes share a run. Any free port of it will do."""
    processes: CountOrNone = None
    """Processes that share a run. Without it as many as Slurm, Open MPI, Kubernetes or a TPU pod started; 1 is alone."""
    process_id: WholeOrNone = None
    """Number of this process, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfHosts(OfProcesses):
    """Of a command whose processes each work on their share, of what another one need not know."""

    workers_of: str | None = None
    """The share of the plan that this process takes: 3/8 is the third of eight. Runs with different ones share a store."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together(OfProcesses):
    """Of a command whose processes compute as one: they join (`joining.together`) before JAX looks for devices."""


class Hosts(NamedTuple):
    """The processes of a run, seen from one of them."""

    coordinator: str
    processes: int
    number: int

    @classmethod
    def of(cls, asked: OfProcesses) -> "Hosts | None":
        """As the flags say, else as a cluster does; None of a run that is alone, or knows its share only."""
        coordinator, processes, number = said = (asked.coordinator, asked.processes, asked.process_id)
        share = asked.workers_of if isinstance(asked, OfHosts) else None
        if processes == 1:
            return None
        if said == (None, None, None):
            return _detected() if share is None else None
        if share is not None:
            raise InputError(f"--workers-of: found {share} beside --processes, expected one of the two")
        if coordinator is None or processes is None or number is None:
            raise InputError(f"--coordinator, --processes, --process-id: found {said}, expected all three or none")
        hosts = cls(coordinator, processes, number)
        hosts.check()
        return hosts

    def check(self) -> None:
        """Raises for what no run can have."""
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"--coordinator: found {self.coordinator!r:.80}, expected host:port such as 10.0.0.1:4711")
        if not self.number < self.processes:
            raise InputError(f"--process-id: found {self.number}, expected 0 to {self.processes - 1} of --processes")

    def agree(self, said: Mapping[str, Any], home: Path | str) -> None:
        """Raises in every process unless all say the same and see what process 0 writes to `home`."""
        with Circle(self) as circle:
            everybody = circle.gather(dict(said))
            for number, other in enumerate(everybody):
                names = [name for name in {**everybody[0], **other} if everybody[0].get(name) != other.get(name)]
                if names:
                    parts = [f"{name} is {other.get(name)!r:.80} and {everybody[0].get(name)!r:.80}" for name in names]
                    where = f"process {number} of {self.processes} was told otherwise than process 0"
                    raise InputError(f"{where}: found {shown.listed(parts, 4)}, expected the same in all")
            self._share_storage(circle, storage.place(home) / TOKEN)

    def _share_storage(self, circle: "Circle", place: storage.Place) -> None:
        token = secrets.token_hex(8)
        if self.number == 0:
            _write(place, token.encode())
        written = circle.gather(token)[0].encode()
        sees = circle.gather(_sees(place, written))
        if self.number == 0:
            place.remove()
        if not all(sees):
            who = f"process {sees.index(False)} of {self.processes}"
            raise InputError(f"--out: {who} found no {place}, which process 0 wrote, expected storage that all share")


def take_devices(asked: Any) -> None:
    """Leaves a process its own devices of a node where a cluster started several; before JAX looks for any."""
    told = (
        not isinstance(asked, OfProcesses) or asked.coordinator is not None
    )  # who says which process it is says so of devices
    if not told and Hosts.of(asked) is not None and (local := _cluster()[3]):
        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", ",".join(map(str, local)))


@functools.cache
def _cluster() -> tuple[str | None, int | None, int | None, list[int] | None]:
    """Address, processes, number and local devices, of a cluster whose process this is."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed asks, which tells only those who join

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a package that a cluster's own detection lacks
        return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(WAIT))  # pyright: ignore


def _detected() -> Hosts | None:
    try:
        address, processes, number, _ = _cluster()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"cluster: found none that answers ({reason:.200}); --processes 1 works alone") from None
    if address is None or number is None or processes in (None, 1):
        return None
    return Hosts(address, processes, number)


def _write(place: storage.Place, token: bytes) -> None:
    try:
        place.put(token)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"--out {place}: found no way to write ({error.strerror}), expected a directory") from None


def _sees(place: storage.Place, token: bytes) -> bool:
    end = time.monotonic() + SEEN_AFTER
    while True:
        try:
            if place.read() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


class Circle:
    """All processes of a run, each with a line to process 0: `gather(value)` is everybody's, by their numbers."""

    def __init__(self, hosts: Hosts):
        self.hosts, self.end, self.open = hosts, time.monotonic() + WAIT, ExitStack()
        self.lines: dict[int, Any] = {}  # those of all others, or process 0's

    def __enter__(self) -> "Circle":
        try:
            self._meet()
        except BaseException:
            self.open.close()
            raise
        self.end = time.monotonic() + WAIT  # for those who came last
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def gather(self, value: Any) -> list[Any]:
        """What every process says here; each has to call it as often as all others."""
        if self.hosts.number:
            self._say(0, value)
            return self._hear(0)
        said = [value, *(self._hear(number) for number in range(1, self.hosts.processes))]
        for number in self.lines:
            self._say(number, said)
        return said

    def _meet(self) -> None:
        if self.hosts.number:
            self._add(0, self._reach())
            self._say(0, {"process": self.hosts.number, "processes": self.hosts.processes})
            return
        port = int(self.hosts.coordinator.rpartition(":")[2])
        kind = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        try:
            server = self.open.enter_context(socket.create_server(("", port), backlog=self.hosts.processes, **kind))
        except OSError as error:
            raise InputError(
                f"--coordinator: found port {port} taken ({error.strerror}), expected a free one"
            ) from None
        while len(self.lines) < self.hosts.processes - 1:
            server.settimeout(self._left())
            try:
                line, _ = server.accept()
            except TimeoutError:
                missing = [str(number) for number in range(1, self.hosts.processes) if number not in self.lines]
                who = f"process {shown.listed(missing, 8)} of {self.hosts.processes}"
                raise RunError(f"--coordinator: {who} did not come in {WAIT:g} s, expected all") from None
            self._welcome(line)

    def _welcome(self, line: socket.socket) -> None:
        """Takes a process in; whoever is none of this run's is left alone."""
        self._add(-1, line)
        said, found = self._hear(-1, HELLO), self.lines.pop(-1)
        if not isinstance(said, dict) or said.keys() != {"process", "processes"}:
            return
        number, processes = said["process"], said["processes"]
        if processes != self.hosts.processes:
            raise InputError(f"--processes: found {processes} in process {number}, {self.hosts.processes} in process 0")
        if number in self.lines:
            raise InputError(f"--process-id: found {number} twice, expected each of 0 to {processes - 1} once")
        self.lines[number] = found

    def _reach(self) -> socket.socket:
        host, _, port = self.hosts.coordinator.rpartition(":")
        while True:
            try:
                return socket.create_connection(
                    (host.strip("[]"), int(port)), timeout=max(1.0, min(self._left(), 10.0))
                )
            except OSError as error:
                if not self._left():
                    found = f"found no answer in {WAIT:g} s ({error.strerror or error})"
                    raise RunError(f"--coordinator {self.hosts.coordinator}: {found}, expected process 0") from None
            time.sleep(0.2)

    def _add(self, number: int, line: socket.socket) -> None:
        self.open.enter_context(line)
        self.lines[number] = line, line.makefile("rb")

    def _say(self, number: int, value: Any) -> None:
        line = self.lines[number][0]
        line.settimeout(max(self._left(), 1.0))
        try:
            line.sendall(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise self._gone(number, error) from None

    def _hear(self, number: int, seconds: float = WAIT) -> Any:
        line, file = self.lines[number]
        line.settimeout(max(min(self._left(), seconds), 1.0))
        try:
            return json.loads(file.readline(MOST_BYTES))
        except (OSError, ValueError) as error:
            if number < 0:
                return None
            raise self._gone(number, error) from None

    def _gone(self, number: int, error: Exception) -> RunError:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it ended"
        return RunError(f"process {number} left before all had begun ({why}); see what it said")

    def _left(self) -> float:
        return max(0.0, self.end - time.monotonic())
