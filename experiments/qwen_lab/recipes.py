"""The flags of several commands in one TOML file, a table for each; read and written so that a run can be repeated."""

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qwen_lab import bounds, flags
from qwen_lab.errors import INPUT_ERRORS, InputError

ConfigT = TypeVar("ConfigT")


def read(path: Path, default: ConfigT) -> ConfigT:
    """The default with what the file says in its place: tables for those fields that hold flags of their own."""
    try:
        said = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"--config {path!s:.80}: found no file to read ({error.strerror}), expected TOML") from None
    except ValueError as error:
        raise InputError(f"{path}: found no TOML ({error}), expected it") from None
    tables = {name: getattr(default, name) for name in _names(default) if _is_table(getattr(default, name))}
    for name, value in said.items():
        if (name in tables) != isinstance(value, dict):
            expected = f"one of the tables {', '.join(tables)}, or flags before the first of them"
            raise InputError(f"{path}: {name}: found {_shown(value)}, expected {expected}")
    changed = {name: _told(f"{path}: [{name}] ", table, said.get(name, {})) for name, table in tables.items()}
    own = {name: value for name, value in said.items() if name not in tables}
    return _told(f"{path}: ", dataclasses.replace(default, **changed), own)  # pyright: ignore[reportArgumentType]


def told(config: ConfigT, arguments: Sequence[str]) -> tuple[ConfigT, list[str]]:
    """The config with what flags such as `--train.steps 5` say, and the words of a command line that are left."""
    words: dict[str, list[str]] = {name: [] for name in _names(config) if _is_table(getattr(config, name))}
    left: list[str] = []
    into = left
    for word in arguments:
        if word.startswith("--"):
            name, dot, flag = word[2:].partition(".")
            into = words[name] if dot and name in words else left
            word = word if into is left else f"--{flag}"
        into.append(word)
    changed = {}
    for name, given in words.items():
        table = getattr(config, name)
        with of_table(name):
            changed[name] = flags.parse(type(table), None, given, table)
    return dataclasses.replace(config, **changed), left  # pyright: ignore[reportArgumentType]


@contextmanager
def of_table(name: str) -> Iterator[None]:
    """An error about a flag says whose it is: `--train.steps: found …`."""
    try:
        yield
    except INPUT_ERRORS as error:
        head, colon, rest = str(error).partition(": ")
        named = re.sub(r"--(?=[a-z])", f"--{name}.", head) if "--" in head else f"{name}: {head}"
        raise InputError(f"{named}{colon}{rest}") from error


def written(config: Any, heading: Iterable[str]) -> str:
    """A file that `read` makes this config of, whatever its default; None is the text None, as on a command line."""
    lines = [f"# {line}" for line in heading]
    fields = {name: getattr(config, name) for name in _names(config)}
    lines += [f"{name} = {_value(value)}" for name, value in fields.items() if not _is_table(value)]
    for name, table in fields.items():
        if _is_table(table):
            lines += ["", f"[{name}]", *(f"{flag} = {_value(getattr(table, flag))}" for flag in _names(table))]
    return "\n".join(lines) + "\n"


def _told(where: str, config: ConfigT, said: dict[str, Any]) -> ConfigT:
    for given, value in said.items():
        name = given.replace("-", "_")
        if name not in _names(config) or _is_table(getattr(config, name)):
            near = difflib.get_close_matches(name, _names(config), 1)
            raise InputError(
                f"{where}{given}: found no such flag, expected one that --help names"
                + (f" (such as {near[0]})" if near else "")
            )
        try:
            config = flags.parse(type(config), None, _words(name, value, getattr(config, name)), config)
            bounds.check(config)
        except InputError as error:
            raise InputError(f"{where}{given}: {str(error).partition(': ')[2]}") from None
    return config


def _words(name: str, value: Any, default: Any) -> list[str]:
    """A value as a command line has it."""
    flag = name.replace("_", "-")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InputError(f"--{flag}: found {_shown(value)}, expected true or false")
        return [f"--{flag}" if value else f"--no-{flag}"]
    several = isinstance(value, list)
    for each in value if several else [value]:
        if not isinstance(each, str | int | float) or (several and str(each).startswith("--")):
            raise InputError(f"--{flag}: found {_shown(each)}, expected text, a number or a list of them")
    return [f"--{flag}", *map(str, value)] if several else [f"--{flag}={_plain(value)}"]


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool | int | float):
        return _plain(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _is_table(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _shown(value: Any) -> str:
    return "a table" if isinstance(value, dict) else f"{value!r:.80}"
