"""ARC tasks as documents: a prompt with its right answer, and where in the text each cell of its grids stands."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

import arc
import qwen_eqx
import sae
from arc.encode import Encoder, as_encoder
from arc.prompt import PromptFormat, TooLong
from arc.spans import Cell
from qwen_lab import prompts

PARTS = ("input", "output")


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
    cells: list[Cell]  # of all its grids, the right answer's among them
    pairs: int  # training pairs of the task: a cell of a later pair is the test's

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
    encoder: str | Encoder | None = None,
    format: str | PromptFormat | None = None,
) -> list[Document]:
    """Every test input that fits with its answer, with training pairs left out if need be."""
    asking = prompts.asking(tokenizer, budget=max_tokens, encoder=encoder, format=format)
    each = (_document(task, test, tokenizer, asking) for task in tasks for test in range(len(task.test)))
    fitting = [document for document in each if document is not None]
    prompts.some_fit(fitting, len(tasks), max_tokens)
    return fitting


def cells_of_tokens(cells: Sequence[Cell], offsets: Sequence[tuple[int, int]]) -> list[Cell | None]:
    """The cell that each token stands in, of `arc.prompt.build(…).cells` and `tokenizer.encode_with_offsets(text)`.

    A token that holds characters of several cells is the first one's; None where it holds of none.
    """
    owner: dict[int, Cell] = {}
    for cell in cells:
        owner |= dict.fromkeys(range(cell.start, cell.end), cell)
    return [next((owner[at] for at in range(*span) if at in owner), None) for span in offsets]


def _document(task: arc.Task, test: int, tokenizer: qwen_eqx.Tokenizer, asking: arc.Asking) -> Document | None:
    encoder, truth = as_encoder(asking.encoder), task.test[test].output
    answer = "" if truth is None else encoder.encode(truth)[len(encoder.opening) :]
    answered = dataclasses.replace(asking, count=lambda text: len(tokenizer.encode(text + answer)))
    try:
        prompt = answered.prompt(task, test)
    except TooLong:
        return None
    cells, text = list(prompt.cells), prompt.text
    if truth is not None:
        cells += arc.spans.cells_of(encoder, truth, len(task.train) + test, "output", len(text) - len(encoder.opening))
        text += answer
    kept = [number for number in range(len(task.train)) if number not in prompt.dropped]
    titles = {(number, part): f"example {place}, {part}" for place, number in enumerate(kept, 1) for part in PARTS}
    titles |= {(len(task.train) + test, "input"): "test input", (len(task.train) + test, "output"): "right answer"}
    placed = [
        _placed(titles[grid], list(each))
        for grid, each in itertools.groupby(cells, key=lambda cell: (cell.pair, cell.part))
    ]
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    return Document(task.id, test, text, encoding.ids, list(encoding.offsets), placed, cells, len(task.train))


def _placed(title: str, cells: list[Cell]) -> PlacedGrid:
    """The grid that these cells make, in the order of its rows."""
    rows = [list(row) for _, row in itertools.groupby(cells, key=lambda cell: cell.row)]
    grid = arc.as_grid([[cell.colour for cell in row] for row in rows])
    return PlacedGrid(title, grid, [[(cell.start, cell.end) for cell in row] for row in rows])
