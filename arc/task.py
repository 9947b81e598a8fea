"""A puzzle: pairs that show a rule, and inputs to apply it to."""

from dataclasses import dataclass, replace
from html import escape

import numpy as np

from arc import drawing
from arc.errors import InputError
from arc.grid import Grid, as_grid, size_of

_DRAWN = 12  # pairs of a task in a notebook


@dataclass(frozen=True, eq=False)
class Pair:
    """One example; `output` is None where the answer is withheld."""

    input: Grid
    output: Grid | None = None

    def __post_init__(self):
        object.__setattr__(self, "input", as_grid(self.input, "input"))
        if self.output is not None:
            object.__setattr__(self, "output", as_grid(self.output, "output"))

    def __repr__(self) -> str:
        return f"Pair({size_of(self.input)} -> {size_of(self.output)})"

    def _repr_html_(self) -> str:
        return drawing.in_row(_drawn("", self))

    def _content(self) -> tuple:
        return tuple(None if g is None else (g.shape, g.tobytes()) for g in (self.input, self.output))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pair) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())


@dataclass(frozen=True)
class Task:
    """At least one training pair, each with its output, and at least one test pair."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def __post_init__(self):
        for part in ("train", "test"):
            object.__setattr__(self, part, tuple(getattr(self, part)))
            if not getattr(self, part):
                raise InputError(f"task {self.id}, {part}: found no pairs, expected at least 1")
        for index, pair in enumerate(self.train):
            if pair.output is None:
                raise InputError(f"task {self.id}, train pair {index}, output: missing, expected a grid")

    def __repr__(self) -> str:
        return f"Task({self.id!r:.40}, train {len(self.train)}, test {len(self.test)})"

    def _repr_html_(self) -> str:
        pairs = [
            (f"{part} {index}, ", pair) for part in ("train", "test") for index, pair in enumerate(getattr(self, part))
        ]
        shown = "".join(drawing.in_row(_drawn(name, pair)) for name, pair in pairs[:_DRAWN])
        more = f"<p>and {len(pairs) - _DRAWN:,} pairs more</p>" if len(pairs) > _DRAWN else ""
        return f"<div><p><b>{escape(self.id[:80])}</b></p>{shown}{more}</div>"

    def without_answers(self) -> "Task":
        """The task as a solver sees it: no test outputs."""
        return replace(self, test=tuple(Pair(pair.input) for pair in self.test))

    def leave_one_out(self, index: int) -> "Task":
        """The training pair `index` as the test pair of a smaller task whose answer is known."""
        rest = self.train[:index] + self.train[index + 1 :]
        return Task(f"{self.id}-without-{index}", rest, (self.train[index],))

    def to_dict(self) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The ARC JSON object; withheld outputs are left out."""
        return {part: [_pair_dict(pair) for pair in getattr(self, part)] for part in ("train", "test")}


def _drawn(name: str, pair: Pair) -> list[str]:
    return [drawing.figure(pair.input, f"{name}input"), drawing.figure(pair.output, f"{name}output")]


def _pair_dict(pair: Pair) -> dict[str, list[list[int]]]:
    outputs = {} if pair.output is None else {"output": pair.output.tolist()}
    return {"input": pair.input.tolist(), **outputs}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal shape and equal cells: what the competition calls correct."""
    return np.array_equal(a, b)
