"""Stages that follow one another below one directory: where each writes, which are whole, and on what they were made."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from arc.files import read_json
from qwen_lab import files
from qwen_lab.errors import InputError

FILE = "stages.json"
HERE = "OUT"  # in flags: OUT/extract is the directory of the stage extract
FREE = ("out", "mesh", "track")  # flags that change no result
SOURCES = ("dataset", "model", "tasks", "data")  # flags that may name a file or a directory that somebody changes


def resolved(tables: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The stages' flags with directories for OUT/STAGE."""
    places = {
        name: out / name if str(table.out) == f"{HERE}/{name}" else table.out
        for name, table in tables.items()
    }  # fmt: skip

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        here, _, rest = str(value).partition("/")
        name, slash, inside = rest.partition("/")
        if not isinstance(value, str | Path) or here != HERE or name not in places:
            return value
        found = f"{places[name]}{slash}{inside}"
        return Path(found) if isinstance(value, Path) else found

    return {
        name: dataclasses.replace(
            table, **{field.name: filled(getattr(table, field.name)) for field in dataclasses.fields(table)}
        )
        for name, table in tables.items()
    }


@dataclasses.dataclass(frozen=True)
class Basis:
    """What a stage's result depends on, as digests: its flags, and what it reads."""

    flags: str
    reads: str


def basis(table: Any, filled: Any, before: Basis | None) -> Basis:
    """Of a stage with these flags, as given and as `resolved`, after another one or none."""
    told = {name: value for name, value in files.jsonable(table).items() if name not in FREE}
    made = {name for name in SOURCES if str(getattr(table, name, "")).startswith(f"{HERE}/")}  # by the stage before
    found = {name: list(_contents(getattr(filled, name, None))) for name in SOURCES if name not in made}
    return Basis(files.digest(told), files.digest([before and dataclasses.asdict(before), found]))


def _contents(value: Any) -> Iterator[list[str]]:
    """Name and digest of the files that a flag names: one, or those in a directory."""
    for each in value if isinstance(value, tuple) else [value]:
        path = Path(each) if isinstance(each, str | Path) and str(each) else None
        try:
            inside = [path] if path and path.is_file() else sorted(path.iterdir()) if path and path.is_dir() else []
        except OSError:  # a name that no system takes is said where it is read
            continue
        for file in inside:
            if file.is_file():
                with file.open("rb") as handle:
                    yield [file.name, hashlib.file_digest(handle, "sha256").hexdigest()]


@dataclasses.dataclass
class Mark:
    """How far a stage has come."""

    basis: Basis
    done: bool
    seconds: float


class Marks:
    """The marks of all stages, in OUT/stages.json."""

    def __init__(self, out: Path):
        self.path = out / FILE
        found = read_json(self.path) if self.path.exists() else {}
        try:
            self.of = {name: Mark(**mark | {"basis": Basis(**mark["basis"])}) for name, mark in found.items()}
        except (AttributeError, KeyError, TypeError):
            raise InputError(f"{self.path}: found another file, expected what an earlier run wrote") from None

    def whole(self, name: str, on: Basis, results: Sequence[Path]) -> bool:
        """Whether the stage has ended on just this, and its results are still there."""
        mark = self.of.get(name)
        there = all(path.exists() for path in results)
        return mark is not None and mark.done and mark.basis == on and there

    def set(self, name: str, on: Basis, done: bool, seconds: float) -> None:
        self.of[name] = Mark(on, done, round(seconds, 1))
        files.write_json(self.path, {name: dataclasses.asdict(mark) for name, mark in self.of.items()})
