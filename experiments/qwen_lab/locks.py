"""One run at a time in a directory: a mark that names it, held by the kernel, so that a dead run's never blocks."""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from qwen_lab import files
from qwen_lab.errors import InputError, full
from sae.data.plan import Plan

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".running.tmp"  # as temporary files are named, so that a store counts it as none of its own
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what some network file systems answer


class Share(NamedTuple):
    """One of several equal shares of a plan, from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Of `3/8`."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise InputError(f"--workers-of: found {text!r:.40}, expected a share such as 3/8, the third of eight")
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def of_plan(self, plan: Plan, missing: Sequence[int]) -> tuple[int, ...]:
        """The missing shards that are this share's."""
        return plan.share(missing, self.number - 1, self.of)

    @property
    def suffix(self) -> str:
        """For the name of a file of its own."""
        return f"-{self.number}-of-{self.of}"


@contextmanager
def claimed(directory: Path, share: Share | None = None) -> Iterator[Path]:
    """Makes a run's directory and keeps other runs out of it; raises, naming the run that is there.

    The lock is flock's, on OUT/.running.tmp: it ends with its process, however that ends. Where a system has no flock, the
    mark of a process that lives on this host blocks, and another host's does not. Runs with different shares of as many
    work side by side, each behind a lock of its own, and keep all others out.
    """
    made = not directory.exists()
    files.fresh_directory(directory)
    try:
        with ExitStack() as held:
            held.enter_context(_held(directory / NAME, share, shared=share is not None))
            if share is not None:
                with turn(directory):  # two that look at a dead run's lock at once would keep each other out
                    _check_shares(directory, share)
                held.enter_context(_held(directory / NAME.replace(".tmp", f"{share.suffix}.tmp"), share))
            yield directory
    finally:
        if made:
            with suppress(OSError):  # it holds something
                directory.rmdir()


@contextmanager
def turn(directory: Path) -> Iterator[None]:
    """Runs that share a directory are in this with block one after the other."""
    with _held(directory / ".turn.tmp", None, wait=True):
        yield


@contextmanager
def _held(path: Path, share: Share | None, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    try:
        handle = _open(path, share, shared, wait)
    except OSError as error:
        if full(error, path):
            raise
        where = f"--out {path.parent}"
        raise InputError(f"{where}: found no way to write ({error.strerror}), expected a directory") from None
    try:
        yield
    finally:
        if not shared or _alone(handle):
            path.unlink(missing_ok=True)  # before the lock goes, or another run's mark would be unlinked
        os.close(handle)


def _open(path: Path, share: Share | None, shared: bool, wait: bool) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(handle, shared, wait):
                raise _taken(path)
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # a run that ended meanwhile took the file away
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(new_mark(share)).encode(), 0)
    return handle


def new_mark(share: Share | None) -> dict[str, Any]:
    """What this run says of itself."""
    mark = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    return mark | ({} if share is None else {"share": str(share)})


def _lock(handle: int, shared: bool = False, wait: bool = False) -> bool:
    """Whether the lock is ours now."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    mark = read_mark(os.pread(handle, 4096, 0))
    shares = shared and "share" in mark
    return wait or shares or mark.get("host") != socket.gethostname() or not lives(mark.get("pid"))


def _alone(handle: int) -> bool:
    """Whether nobody shares a lock with us."""
    try:
        return fcntl is not None and _lock(handle)
    except OSError:
        return False


def _check_shares(directory: Path, share: Share) -> None:
    """Raises if somebody works there on a share of another number of shares: they would overlap."""
    for path in directory.glob(NAME.replace(".tmp", "-*-of-*.tmp")):
        if not path.name.endswith(f"-of-{share.of}.tmp"):
            with suppress(FileNotFoundError), _held(path, None):  # a dead run's
                pass


def lives(pid: object) -> bool:
    """Whether there is such a process here."""
    try:
        os.kill(pid, 0) if isinstance(pid, int) and pid > 0 else None
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return isinstance(pid, int) and pid > 0


def read_mark(data: bytes) -> dict[str, object]:
    """What a run said of itself; nothing where that cannot be read."""
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError):
        return {}


def _taken(path: Path) -> InputError:
    try:
        mark = read_mark(path.read_bytes())
    except OSError:
        mark = {}
    return taken(str(path.parent), mark)


def taken(where: str, mark: Mapping[str, object]) -> InputError:
    """That a run with this mark is at work there."""
    share = f"with --workers-of {mark['share']} " if "share" in mark else ""
    who = f"{share}pid {mark.get('pid', '?')} on {mark.get('host', '?')} since {mark.get('since', '?')}"
    return InputError(f"--out {where}: found another run at work there ({who}), expected none: name another --out")
