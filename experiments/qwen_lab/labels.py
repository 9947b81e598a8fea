"""What each token of a document stands for: the plain properties of the cell that is read, and of the one that is next."""

import itertools

import numpy as np
from jaxtyping import Bool

import arc
from arc import properties
from arc.spans import Cell
from qwen_lab.corpus import Document, cells_of_tokens

OF_TOKENS = (
    "a cell",
    "an output's cell",
    "the test's cell",
    "the answer has begun",
    "end of a row",
    "filler",
    "other text",
)
NAMES = tuple(f"{when}: {name}" for when in ("read", "next") for name in (*OF_TOKENS, *properties.NAMES))


def of_document(document: Document) -> Bool[np.ndarray, "seq properties"]:
    """Every property of NAMES at every token."""
    owners = cells_of_tokens(document.cells, document.offsets)
    begun = min((cell.start for cell in document.cells if _is_answer(cell, document)), default=len(document.text))
    grids = _grids(document)
    masks = {key: _masks(grids, key) for key in grids}
    rows = []
    for owner, piece, (start, _) in zip(owners, document.pieces(), document.offsets, strict=True):
        test = owner is not None and owner.pair >= document.pairs
        kinds = (
            owner is not None,
            owner is not None and owner.part == "output",
            test,
            start >= begun,
            owner is None and "\n" in piece and start > 0,
            piece == "_",
            owner is None and piece != "_" and "\n" not in piece,
        )
        own = np.zeros(len(properties.NAMES), bool)
        if owner is not None:
            own = masks[owner.pair, owner.part][owner.row, owner.col]
        rows.append(np.concatenate([np.asarray(kinds), own]))
    read = np.asarray(rows)
    following = np.concatenate([read[1:], np.zeros_like(read[:1])])
    return np.concatenate([read, following], axis=1)


def _is_answer(cell: Cell, document: Document) -> bool:
    return cell.part == "output" and cell.pair >= document.pairs


def _grids(document: Document) -> dict[tuple[int, str], arc.Grid]:
    """Every grid of a document, of its cells."""
    found = {}
    for key, cells in itertools.groupby(document.cells, key=lambda cell: (cell.pair, cell.part)):
        rows = [list(row) for _, row in itertools.groupby(cells, key=lambda cell: cell.row)]
        found[key] = arc.as_grid([[cell.colour for cell in row] for row in rows])
    return found


def _masks(grids: dict[tuple[int, str], arc.Grid], key: tuple[int, str]) -> np.ndarray:
    """[rows, cols, properties] of one grid, with those of an output beside its input."""
    masks = properties.of_grid(grids[key])
    if key[1] == "output":
        masks |= properties.of_output(grids[key[0], "input"], grids[key])
    return properties.stacked(masks, grids[key].shape)
