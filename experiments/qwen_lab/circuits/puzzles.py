"""Puzzles to trace: one that the model solves, up to a cell of its answer, with its grids as a page draws them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

import qwen_eqx
from arc.spans import Cell
from qwen_lab.circuits.page import Grid
from qwen_lab.corpus import Document, cells_of_tokens
from qwen_lab.errors import InputError


@dataclasses.dataclass(frozen=True)
class Question:
    """A document up to a cell of its answer, which is what the model says next."""

    document: Document
    cell: Cell
    tokens: list[int]
    grids: list[Grid]


def solved(model: qwen_eqx.Qwen, documents: Sequence[Document]) -> Document | None:
    """The first whose every answer token is the one the model finds most likely: what it writes greedily."""
    for document in documents:
        cells = _answer(document)
        if not cells:
            continue
        logits, _ = model.run_with_capture(document.tokens, [], logits="all")
        assert logits is not None
        begin = min(cells)
        said = np.asarray(jnp.argmax(logits[begin - 1 : -1], axis=-1))
        if (said == np.asarray(document.tokens[begin:])).all():
            return document
    return None


def question(document: Document, row: int | None, col: int | None) -> Question:
    """Up to the cell at row and column, from 0; without them the first whose colour is not the answer's commonest."""
    cells = _answer(document)
    colours = [cell.colour for cell in cells.values()]
    common = max(sorted(set(colours)), key=colours.count)
    rare = next((cell for cell in cells.values() if cell.colour != common), next(iter(cells.values())))
    found = [
        place
        for place, cell in cells.items()
        if (cell.row, cell.col) == (rare.row if row is None else row, rare.col if col is None else col)
    ]
    if not found:
        last = max((cell.row, cell.col) for cell in cells.values())
        raise InputError(
            f"--row, --col: found {row}, {col}, expected a cell of the answer: at most {last[0]}, {last[1]}"
        )
    return Question(document, cells[found[0]], document.tokens[: found[0]], _grids(document, found[0]))


def _answer(document: Document) -> dict[int, Cell]:
    """Place among the tokens -> cell of the right answer, in the order of the text; its first token where it has several."""
    owners = cells_of_tokens(document.cells, document.offsets)
    places: dict[int, Cell] = {}
    for place, cell in enumerate(owners):
        if cell is not None and cell.pair >= document.pairs and cell.part == "output" and cell not in places.values():
            places[place] = cell
    return places


def _grids(document: Document, end: int) -> list[Grid]:
    of_char = {char: place for place, span in enumerate(document.offsets) for char in range(*span)}
    return [
        Grid(
            title=grid.title if grid.title == "right answer" else f"{grid.group}, {grid.title}",
            cells=grid.cells.tolist(),
            positions=[
                [place if (place := of_char.get(start, -1)) < end else -1 for start, _ in row] for row in grid.spans
            ],
        )
        for grid in document.grids
    ]
