"""One run at a time in a directory: a mark that names it, held by the kernel, so that a dead run's never blocks."""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_lab import files
from qwen_lab.errors import InputError, full

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".running.tmp"  # as temporary files are named, so that a store counts it as none of its own
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what some network file systems answer


@contextmanager
def claimed(directory: Path) -> Iterator[Path]:
    """Makes a run's directory and keeps other runs out of it; raises, naming the run that is there.

    The lock is flock's, on OUT/.running.tmp: it ends with its process, however that ends. Where a system has no flock, the
    mark of a process that lives on this host blocks, and another host's does not.
    """
    made = not directory.exists()
    files.fresh_directory(directory)
    path = directory / NAME
    try:
        handle = _open(path)
    except OSError as error:
        if full(error, path):
            raise
        raise InputError(f"--out {directory}: found no way to write ({error.strerror}), expected a directory") from None
    try:
        yield directory
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, or another run's mark would be unlinked
        os.close(handle)
        if made:
            with suppress(OSError):  # it holds something
                directory.rmdir()


def _open(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(handle):
                raise _taken(path)
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # a run that ended meanwhile took the file away
    mark = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(mark).encode(), 0)
    return handle


def _lock(handle: int) -> bool:
    """Whether the lock is ours now."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    mark = _read(os.pread(handle, 4096, 0))
    return mark.get("host") != socket.gethostname() or not _lives(mark.get("pid"))


def _lives(pid: object) -> bool:
    try:
        os.kill(pid, 0) if isinstance(pid, int) and pid > 0 else None
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return isinstance(pid, int) and pid > 0


def _read(data: bytes) -> dict[str, object]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError):
        return {}


def _taken(path: Path) -> InputError:
    try:
        mark = _read(path.read_bytes())
    except OSError:
        mark = {}
    who = f"pid {mark.get('pid', '?')} on {mark.get('host', '?')} since {mark.get('since', '?')}"
    return InputError(
        f"--out {path.parent}: found another run at work there ({who}), expected none: name another --out"
    )
