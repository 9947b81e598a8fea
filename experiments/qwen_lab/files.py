"""Files that are whole or not there, and plain values to put into them."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from qwen_lab.errors import InputError, full
from sae.files import commit


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, a text."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all; an OSError names it, and the bytes it needed."""
    try:
        commit(path, data)
    except OSError as error:
        error.filename, error.needed = str(path), len(data)  # pyright: ignore[reportAttributeAccessIssue]
        raise


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, an indented value."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def location(path: Path) -> Path | str:
    """What a flag named: a path, or the URL that a `Path` keeps one slash of two of."""
    found = re.fullmatch("([a-z][a-z0-9+.-]+):/(.*)", path.as_posix())
    return path if found is None else f"{found[1]}://{found[2]}"


def beside(path: Path) -> Path:
    """The directory of this machine for what goes with a run's: itself, or for a URL one that its name leads to."""
    if isinstance(location(path), Path):
        return path
    return Path("runs") / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def fresh_directory(path: Path) -> Path:
    """Makes `path`; raises if something that is no directory stands there."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path}: found a file, expected a directory or nothing")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if full(error, path):
            raise
        raise InputError(f"--out {path}: found no way to make it ({error.strerror}), expected a directory") from None
    return path


def expect_files(directory: Path, *names: str) -> None:
    """Raises if a directory stands where a run will write one of these files."""
    for name in names:
        if (directory / name).is_dir():
            raise InputError(f"{directory / name}: found a directory, expected a file or nothing")


def drop_halves(directory: Path) -> None:
    """Removes what `commit` could not finish below a run's directory."""
    for half in directory.glob("**/.*.????????.tmp"):
        half.unlink(missing_ok=True)


def jsonable(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
