"""The numbers of a run as it goes: lines of its metrics.jsonl, and beside them trackio or wandb where one is asked for."""

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal

from qwen_lab import cli, files
from qwen_lab.errors import InputError

METRICS, NAME = "metrics.jsonl", "tracked.json"
PROJECT = "qwen-eqx"
Track = Literal["none", "trackio", "wandb"]


def check(track: Track) -> None:
    """Raises if the package asked for is not there: before anything is computed."""
    if track != "none":
        _module(track)


def _module(track: str) -> ModuleType:
    try:
        return importlib.import_module(track)
    except ModuleNotFoundError as error:
        found = f"no {error.name} here"
    except Exception as error:
        found = f"{track}, which cannot be imported ({_line(error)})"
    remedy = "pip install 'qwen-eqx[track]'" if track == "trackio" else f"pip install {track}"
    raise InputError(f"--track: found {found}, expected it installed: {remedy}") from None


class Log:
    """Takes the numbers of one run: `with Log(…) as log: log.add({"step": 10, "loss": 0.3})`.

    Begins metrics.jsonl with `history`, so that a resumed run forgets what stood behind its checkpoint; None goes on
    after the lines that stand there. Processes that share a run each have a `share` in their file's name. A tracker that
    fails is said once and left alone: it never ends a run.
    """

    def __init__(
        self,
        out: Path,
        track: Track,
        config: Any,
        history: Sequence[Mapping[str, Any]] | None = None,
        members: Sequence[str] = (),
        share: str = "",
    ):
        self.path, self.track, self.members = out / METRICS.replace(".", f"{share}."), track, members
        lines = _standing(self.path) if history is None else [json.dumps(line) for line in history]
        files.write_text(self.path, "".join(f"{line}\n" for line in lines))
        self.run: Any = None
        if track != "none":
            own = out / NAME.replace(".", f"{share}.")
            name = _name(own, going_on=bool(lines))  # a disk that is full is no fault of the tracker's
            self._careful(lambda: self._begin(name, files.jsonable(config)))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.run is not None:
            self._careful(lambda: self.run.finish())

    def add(self, line: Mapping[str, Any]) -> None:
        """One line: numbers, and dicts or lists of them; `step` is the place on the axis."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.run is not None:
            numbers = flat({name: value for name, value in line.items() if name != "step"}, self.members)
            self._careful(lambda: self.run.log(numbers, step=line.get("step")))

    def _begin(self, name: str, config: dict[str, Any]) -> None:
        options: dict[str, Any] = {"project": PROJECT, "name": name, "config": config, "resume": "allow"}
        own = {"id": name} if self.track == "wandb" else {"embed": False}
        self.run = _module(self.track).init(**options, **own)

    def _careful(self, call: Any) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:
            self.run = None
            cli.console.print(f"--track {self.track} failed ({_line(error)}); the run goes on without it", markup=False)


def flat(line: Mapping[str, Any], members: Sequence[str] = ()) -> dict[str, int | float]:
    """The numbers of a line, one name each: `families/mirror`; those of a list by the names of its members.

    A list of one is a number, and what is no number is left out.
    """
    found: dict[str, int | float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            names = members if len(members) == len(value) else list(map(str, range(len(value))))
            value = value[0] if len(value) == 1 else dict(zip(names, value, strict=True))
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in flat(value, members).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def _standing(path: Path) -> list[str]:
    """The whole lines of a file; what a kill left of its last one is dropped."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _name(path: Path, going_on: bool) -> str:
    """What the tracker calls this run; kept beside it, so that a run that goes on is one curve and a new one another."""
    if going_on and path.exists():
        try:
            return str(json.loads(path.read_text())["run"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: found another file, expected the tracker's name of this run") from None
    name = f"{path.resolve().parent.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    files.write_json(path, {"run": name})
    return name


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
