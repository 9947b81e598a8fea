"""Files that are whole or not there, and plain values to put into them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from qwen_lab.errors import InputError
from sae.files import commit


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    commit(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, an indented value."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def fresh_directory(path: Path) -> Path:
    """Makes `path`; raises if something that is no directory stands there."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path}: found a file, expected a directory or nothing")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: found no way to make it ({error.strerror}), expected a directory") from None
    return path


def jsonable(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
