"""Files in and out: what is wrong is said in one line, and nothing is left half-written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from arc.errors import InputError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file that should exist."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or directory") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: found a Git LFS pointer, expected the data; run `git lfs pull` beside it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found byte {data[error.start]:#04x} at {error.start}, expected UTF-8 text") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value in a JSON text; a key written twice is refused, for the usual reader drops the first in silence."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise InputError(f"{where}: {place}: found {error.msg[:1].lower() + error.msg[1:]}, expected JSON") from None
    except (ValueError, RecursionError) as error:  # a key twice, an integer of thousands of digits, deep nesting
        reason = str(error).partition(";")[0]
        raise InputError(f"{where}: found {reason}, expected JSON of plain tasks") from None


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    if len(value) < len(items):
        keys = [key for key, _ in items]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return value


@contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """A file to write beside `path`: at the end it takes the name in one step; after a failure nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text that fits in memory."""
    with whole(path) as handle:
        handle.write(text)
