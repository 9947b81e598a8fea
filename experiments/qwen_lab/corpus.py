"""ARC tasks as documents: a prompt with its right answer, and where in the text each cell of its grids stands."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

import arc
import qwen_eqx
from arc.encode import Encoder, as_encoder
from arc.prompt import Prompt, PromptFormat, TooLong
from arc.spans import Cell
from qwen_lab import prompts

PARTS = ("input", "output")


@dataclasses.dataclass(frozen=True)
class PlacedGrid:
    """A grid of a document, with the characters [start, end) of each cell."""

    group: str  # example 1, …, or test
    title: str  # input, output, or right answer
    pair: int  # as a Cell's
    cells: arc.Grid
    spans: list[list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Document:
    """One test input with its right answer where that is known, as a model reads it."""

    puzzle: arc.Task
    test: int
    asking: arc.Asking
    prompt: Prompt
    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]]  # the characters of each token
    grids: list[PlacedGrid]
    cells: list[Cell]  # of all its grids, the right answer's among them

    @property
    def task(self) -> str:
        return self.puzzle.id

    @property
    def pairs(self) -> int:
        """Training pairs of the task: a cell of a later pair is the test's."""
        return len(self.puzzle.train)

    @property
    def asked(self) -> int:
        """How many tokens begin in the prompt; the others are the answer's."""
        return sum(start < len(self.prompt.text) for start, _ in self.offsets)

    def pieces(self) -> list[str]:
        """The text of each token."""
        return [self.text[start:end] for start, end in self.offsets]

    def tokens_of(self, grid: PlacedGrid) -> Int[np.ndarray, "rows cols 2"]:
        """The tokens [first, end) that the characters of each cell lie in."""
        starts, ends = (np.asarray([span[which] for span in self.offsets]) for which in (0, 1))
        spans = np.asarray(grid.spans)
        first = np.searchsorted(ends, spans[..., 0], "right")
        return np.stack([first, np.maximum(np.searchsorted(starts, spans[..., 1], "left"), first)], axis=-1)

    def turned(self, augmentation: arc.Augmentation, tokenizer: qwen_eqx.Tokenizer) -> "Document | None":
        """The same question about the task as it is augmented; None where that does not fit."""
        return _document(augmentation.apply(self.puzzle), self.test, tokenizer, self.asking)

    def answered(self, grid: arc.Grid, tokenizer: qwen_eqx.Tokenizer) -> "Document":
        """The same prompt with another answer."""
        tests = list(self.puzzle.test)
        tests[self.test] = arc.Pair(tests[self.test].input, grid)
        return _with_answer(
            dataclasses.replace(self.puzzle, test=tuple(tests)), self.test, tokenizer, self.asking, self.prompt
        )


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
    answer = _spelled(task, test, asking)
    answered = dataclasses.replace(asking, count=lambda text: len(tokenizer.encode(text + answer)))
    try:
        prompt = answered.prompt(task, test)
    except TooLong:
        return None
    return _with_answer(task, test, tokenizer, asking, prompt)


def _spelled(task: arc.Task, test: int, asking: arc.Asking) -> str:
    """What follows a prompt where the answer is right."""
    encoder, truth = as_encoder(asking.encoder), task.test[test].output
    return "" if truth is None else encoder.encode(truth)[len(encoder.opening) :]


def _with_answer(
    task: arc.Task, test: int, tokenizer: qwen_eqx.Tokenizer, asking: arc.Asking, prompt: Prompt
) -> Document:
    encoder, truth = as_encoder(asking.encoder), task.test[test].output
    cells, text = list(prompt.cells), prompt.text + _spelled(task, test, asking)
    if truth is not None:
        at = len(prompt.text) - len(encoder.opening)
        cells += arc.spans.cells_of(encoder, truth, len(task.train) + test, "output", at)
    kept = [number for number in range(len(task.train)) if number not in prompt.dropped]
    titles = {(number, part): (f"example {place}", part) for place, number in enumerate(kept, 1) for part in PARTS}
    of_test = len(task.train) + test
    titles |= {(of_test, "input"): ("test", "input"), (of_test, "output"): ("test", "right answer")}
    placed = [
        _placed(*titles[grid], grid[0], list(each))
        for grid, each in itertools.groupby(cells, key=lambda cell: (cell.pair, cell.part))
    ]
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    return Document(task, test, asking, prompt, text, encoding.ids, list(encoding.offsets), placed, cells)


def _placed(group: str, title: str, pair: int, cells: list[Cell]) -> PlacedGrid:
    """The grid that these cells make, in the order of its rows."""
    rows = [list(row) for _, row in itertools.groupby(cells, key=lambda cell: cell.row)]
    grid = arc.as_grid([[cell.colour for cell in row] for row in rows])
    return PlacedGrid(group, title, pair, grid, [[(cell.start, cell.end) for cell in row] for row in rows])
