"""Small files in and out: what a person may have got wrong is said in one line, and nothing is left half-written."""

import json
import os
from pathlib import Path
from typing import Any

from qwen_eqx.errors import InputError

MAX_JSON_BYTES = 1 << 28  # Qwen's tokenizer.json is 11 MB; a file beyond this is not one of ours
LFS_HEAD = b"version https://git-lfs"


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
    except FileNotFoundError:
        raise InputError(f"{path}: found no such file, expected it in this directory") from None
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a readable file") from None
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
