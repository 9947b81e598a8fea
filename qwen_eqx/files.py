"""Small files in and out: what a person may have got wrong is said in one line, and nothing is left half-written."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen_eqx.errors import DiskFull, InputError

MAX_JSON_BYTES = 1 << 28  # Qwen's tokenizer.json is 11 MB; a file beyond this is not one of ours
LFS_HEAD = b"version https://git-lfs"


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's share of it, the largest file allowed


def local_path(name: str | Path, argument: str) -> Path:
    """The path a name stands for, there or not, with `~` for the home directory; raises where no system takes it for one."""
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
    except (OSError, RuntimeError, ValueError) as error:  # too long, or no access; ~nobody; a NUL or a lone surrogate
        said = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        shown = repr(str(name)) if len(str(name)) <= 100 else f"{str(name)[:100]!r}… of {len(str(name))} characters"
        raise InputError(f"{argument}: found {shown} ({said}), expected a path that can be read") from None
    return path


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Around what writes `needed` bytes at `path`: raises `DiskFull` before it if they do not fit, or if they did not."""
    free = _free(path)
    if needed > free:
        raise DiskFull(path, needed, free)
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise DiskFull(path, needed, _free(path)) from None


def _free(path: Path) -> int:
    return shutil.disk_usage(path if path.is_dir() else path.parent).free


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file's first bytes are those of a Git LFS pointer instead of the data."""
    return head.startswith(LFS_HEAD)


def read_bytes(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a file that should exist, be no larger than `limit` and not be an LFS pointer."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path}: found something that is not a file, expected a file")
        if size > limit:
            raise InputError(f"{path}: found {size} bytes, expected at most {limit}")
        data = path.read_bytes()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: found no such file, expected it in this directory") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        raise InputError(f"{path}: found {getattr(error, 'strerror', error)}, expected a readable file") from None
    if is_lfs_pointer(data):
        raise InputError(f"{path}: found a Git LFS pointer, expected the data; run `git lfs pull` in that directory")
    return data


def read_text(path: Path, *, limit: int = MAX_JSON_BYTES) -> str:
    """The text of a UTF-8 file."""
    try:
        return read_bytes(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: found byte {error.object[error.start]:#04x} at {error.start}, expected UTF-8"
        ) from None


def _no_constant(name: str) -> float:
    raise ValueError(f"the constant {name}")


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file; NaN and Infinity are refused."""
    text = read_text(path, limit=limit)
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: found {error.msg} at line {error.lineno}, expected JSON") from None
    except RecursionError:
        raise InputError(f"{path}: found JSON nested too deeply, expected a plain object") from None
    except ValueError as error:
        raise InputError(f"{path}: found {error}, expected JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content


def fsync_directory(directory: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """Where a file is written before it takes its name; one per process, so two writers never share it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def give_name(temporary: Path, path: Path) -> None:
    """Flush a written temporary file to disk and give it its name in one step."""
    with open(temporary, "rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
