"""Where in a text each cell of a grid stands, whatever wrote it."""

import itertools
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from arc.encode import Code, Encoder, Json, LineEncoder, Shape
from arc.errors import InputError
from arc.grid import Grid

Part = Literal["input", "output"]
_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters that mark a grid's text while a prompt is built


class Cell(NamedTuple):
    """One cell of a grid in a text: characters [start, end)."""

    pair: int
    """Number in `task.train`; of the test input `len(task.train) + test`."""
    part: Part
    row: int
    col: int
    colour: int
    start: int
    end: int


@dataclass(frozen=True)
class Marked(Encoder):
    """An encoder's text between two marks, so that a grid is found wherever a prompt puts it."""

    inner: Encoder

    def encode(self, grid: Grid) -> str:
        return _OPEN + self.inner.encode(grid) + _CLOSE

    def rows(self, text: str) -> list[list[int]]:
        return self.inner.rows(text.strip(_OPEN + _CLOSE))

    @property
    def opening(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.opening


def unmarked(text: str) -> tuple[str, list[int]]:
    """The text without marks, and where in it each marked grid starts."""
    starts, plain = [], 0
    for part in re.split(f"({_OPEN}|{_CLOSE})", text):
        if part == _OPEN:
            starts.append(plain)
        elif part != _CLOSE:
            plain += len(part)
    return text.replace(_OPEN, "").replace(_CLOSE, ""), starts


def cells_of(encoder: Encoder, grid: Grid, pair: int, part: Part, at: int = 0) -> list[Cell]:
    """The cells of one grid whose text starts at character `at`."""
    spans = cell_spans(encoder, grid)
    return [
        Cell(pair, part, row, col, int(grid[row, col]), at + start, at + end)
        for row, line in enumerate(spans)
        for col, (start, end) in enumerate(line)
    ]


def cell_spans(encoder: Encoder, grid: Grid) -> list[list[tuple[int, int]]]:
    """The characters [start, end) of each cell in `encoder.encode(grid)`; a separator belongs to the cell after it."""
    if isinstance(encoder, Code | Shape):
        start = encoder.encode(grid).index("\n") + 1
        return [[(start + a, start + b) for a, b in row] for row in cell_spans(encoder.inner, grid)]
    if isinstance(encoder, Json):
        digits = iter([match.span() for match in re.finditer("[0-9]", encoder.encode(grid))])
        return [[next(digits) for _ in row] for row in grid]
    if isinstance(encoder, LineEncoder):
        spans, at = [], 0
        for index, cells in enumerate(grid.tolist()):
            ends = [at + len(encoder.stem(cells[:count], index)) for count in range(len(cells) + 1)]
            spans.append(list(itertools.pairwise(ends)))
            at += len(encoder.line(cells, index)) + 1  # the line end
        return spans
    raise InputError(f"encoder {encoder}: found no known layout of cells, expected an encoder of arc.encode")
