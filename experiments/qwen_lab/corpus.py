"""ARC tasks as documents: a prompt with its right answer, and where in the text each cell of its grids stands."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

import arc
import qwen_eqx
import sae
from arc.encode import Code, Encoder, Json, LineEncoder, Shape, as_encoder
from arc.prompt import PromptFormat, TooLong
from qwen_lab import prompts
from qwen_lab.errors import InputError

OPEN, CLOSE = "\ue000", "\ue001"  # private characters that mark a grid's text while a prompt is built


@dataclasses.dataclass(frozen=True)
class Marked(Encoder):
    """An encoder's text between two marks, so that a grid is found wherever a prompt puts it."""

    inner: Encoder

    def encode(self, grid: arc.Grid) -> str:
        return OPEN + self.inner.encode(grid) + CLOSE

    def rows(self, text: str) -> list[list[int]]:
        return self.inner.rows(text.strip(OPEN + CLOSE))

    @property
    def opening(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.opening


@dataclasses.dataclass(frozen=True)
class PlacedGrid:
    """A grid of a document, with the characters [start, end) of each cell."""

    title: str
    cells: arc.Grid
    spans: list[list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Document:
    """One test input with its right answer where that is known, as a model reads it."""

    task: str
    test: int
    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]]  # the characters of each token
    grids: list[PlacedGrid]

    def pieces(self) -> list[str]:
        """The text of each token."""
        return [self.text[start:end] for start, end in self.offsets]

    def painted(self, values: Float[np.ndarray, " seq"]) -> list[sae.report.Grid]:
        """Each grid with the largest activation among the tokens that a cell's characters lie in."""
        of_char = np.zeros(len(self.text) + 1, np.float32)
        for (start, end), value in zip(self.offsets, values, strict=True):
            np.maximum(of_char[start:end], value, out=of_char[start:end])
        return [
            sae.report.Grid(
                grid.title,
                grid.cells.astype(np.int64),
                np.asarray([[of_char[a:b].max(initial=0.0) for a, b in row] for row in grid.spans], np.float32),
            )
            for grid in self.grids
        ]


def documents(
    tasks: Sequence[arc.Task],
    tokenizer: qwen_eqx.Tokenizer,
    *,
    max_tokens: int,
    encoder: str | Encoder = arc.DEFAULT_ENCODER,
    format: str | PromptFormat = arc.DEFAULT_PROMPT,
) -> list[Document]:
    """Every test input that fits with its answer, with training pairs left out if need be."""
    asking = prompts.asking(tokenizer, budget=max_tokens, encoder=encoder, format=format)
    each = (_document(task, test, tokenizer, asking) for task in tasks for test in range(len(task.test)))
    fitting = [document for document in each if document is not None]
    prompts.some_fit(fitting, len(tasks), max_tokens)
    return fitting


def _document(task: arc.Task, test: int, tokenizer: qwen_eqx.Tokenizer, asking: arc.Asking) -> Document | None:
    encoder, truth = as_encoder(asking.encoder), task.test[test].output
    answer = "" if truth is None else encoder.encode(truth)[len(encoder.opening) :]
    answered = dataclasses.replace(
        asking, encoder=Marked(encoder), count=lambda text: len(tokenizer.encode(_unmarked(text)[0] + answer))
    )
    try:
        prompt = answered.prompt(task, test)
    except TooLong:
        return None
    text, starts = _unmarked(prompt.text)
    kept = [pair for number, pair in enumerate(task.train) if number not in prompt.dropped]
    grids = [grid for number, pair in enumerate(kept, 1) for grid in _titled(f"example {number}, ", pair)]
    grids.append(("test input", task.test[test].input))
    if truth is not None:
        grids.append(("right answer", truth))
        starts.append(len(text) - len(encoder.opening))
        text += answer
    placed = [
        PlacedGrid(title, grid, [[(at + a, at + b) for a, b in row] for row in cell_spans(encoder, grid)])
        for (title, grid), at in zip(grids, starts, strict=True)
    ]
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    return Document(task.id, test, text, encoding.ids, list(encoding.offsets), placed)


def _titled(before: str, pair: arc.Pair) -> list[tuple[str, arc.Grid]]:
    assert pair.output is not None  # Task holds no training pair without one
    return [(f"{before}input", pair.input), (f"{before}output", pair.output)]


def _unmarked(text: str) -> tuple[str, list[int]]:
    """The text without marks, and where in it each marked grid starts."""
    starts, plain = [], 0
    for part in re.split(f"({OPEN}|{CLOSE})", text):
        if part == OPEN:
            starts.append(plain)
        elif part != CLOSE:
            plain += len(part)
    return text.replace(OPEN, "").replace(CLOSE, ""), starts


def cell_spans(encoder: Encoder, grid: arc.Grid) -> list[list[tuple[int, int]]]:
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
            ends = [at + len(encoder.line(cells[:count], index)) for count in range(len(cells) + 1)]
            spans.append(list(itertools.pairwise(ends)))
            at = ends[-1] + 1  # the line end
        return spans
    raise InputError(f"encoder {encoder}: found no known layout of cells, expected an encoder of arc.encode")
