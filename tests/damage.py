"""Ways to damage a model directory, and the one line that must come of it; shared by the tests of bad files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import qwen_eqx
from qwen_eqx import InputError
from qwen_eqx.weights.hub import EMBEDDED

TINY = EMBEDDED / "tiny-random"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 988097824\n"
Damage = Callable[[Path], object]


def refuse(directory: Path, damage: Damage, message: str, **named) -> None:
    """The damage makes `from_pretrained` raise one line that says `message`, and writes nothing."""
    damage(directory)
    before = {path.name: path.stat().st_size for path in directory.iterdir()}
    with pytest.raises(InputError, match=message) as caught:
        qwen_eqx.from_pretrained(directory, **named)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value) or named
    assert len(str(caught.value)) < 1500
    assert {path.name: path.stat().st_size for path in directory.iterdir()} == before


def write(name: str, content: str | bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def fields(name: str, **changed) -> Damage:
    """Change fields of a JSON file; ... removes one."""

    def damage(directory: Path) -> None:
        found = json.loads((directory / name).read_text()) | changed
        (directory / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return damage
