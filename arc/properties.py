"""What a person would say of a cell, as masks over its grid: the plain properties that features are compared with."""

from collections.abc import Mapping

import numpy as np

from arc.cells import NEAR, flood, objects
from arc.grid import COLOUR_NAMES, Grid

Mask = np.ndarray  # bool, as large as the grid


def of_grid(grid: Grid) -> dict[str, Mask]:
    """Every property that a grid alone decides."""
    cells = np.asarray(grid)
    rows, cols = np.indices(cells.shape)
    last_row, last_col = cells.shape[0] - 1, cells.shape[1] - 1
    sides = {
        "first row": rows == 0,
        "last row": rows == last_row,
        "first column": cols == 0,
        "last column": cols == last_col,
    }
    ends = (sides["first row"] | sides["last row"]), (sides["first column"] | sides["last column"])
    around = [_moved(cells != 0, *step) for step in NEAR]
    coloured = cells != 0
    return {
        **{f"colour {name}": cells == colour for colour, name in enumerate(COLOUR_NAMES)},
        "coloured": coloured,
        **sides,
        "edge": ends[0] | ends[1],
        "corner": ends[0] & ends[1],
        **_of_objects(cells),
        "inside an object": coloured & np.logical_and.reduce(around),
        "no coloured neighbour": coloured & ~np.logical_or.reduce(around),
        "enclosed": ~coloured & ~flood(~coloured, list(np.argwhere((ends[0] | ends[1]) & ~coloured))),
        "as the cell to the left": (cols > 0) & (cells == _moved(cells, 0, -1)),
        "as the cell above": (rows > 0) & (cells == _moved(cells, -1, 0)),
        "commonest colour but black": coloured & (cells == _commonest(cells)),
    }


def of_output(given: Grid, answer: Grid) -> dict[str, Mask]:
    """Properties of an output's cells beside its input: where both have one size, what stands there is kept or changed."""
    if given.shape != answer.shape:
        nothing = np.zeros(answer.shape, bool)
        return {"copied from the input": nothing, "changed from the input": nothing}
    same = np.asarray(given) == np.asarray(answer)
    return {"copied from the input": same, "changed from the input": ~same}


def stacked(masks: Mapping[str, Mask], shape: tuple[int, int]) -> np.ndarray:
    """[rows, cols, properties] in the order of NAMES; what nobody says is False."""
    return np.stack([masks.get(name, np.zeros(shape, bool)) for name in NAMES], axis=-1)


def _of_objects(cells: np.ndarray) -> dict[str, Mask]:
    masks = objects(cells)
    sizes = [int(mask.sum()) for mask in masks]
    largest = np.zeros(cells.shape, bool)
    for mask, size in zip(masks, sizes, strict=True):
        if size == max(sizes) and sizes.count(size) == 1 and len(sizes) > 1:
            largest |= mask
    return {"in the largest object": largest}


def _moved(cells: np.ndarray, down: int, right: int) -> np.ndarray:
    """What stands `down` rows and `right` columns from each cell; 0 beyond the edge."""
    padded = np.pad(cells, 1)
    return padded[1 + down : 1 + down + cells.shape[0], 1 + right : 1 + right + cells.shape[1]]


def _commonest(cells: np.ndarray) -> int:
    counts = np.bincount(cells[cells != 0].ravel(), minlength=10)
    return int(counts.argmax()) if counts.any() else -1


NAMES = (*of_grid(np.zeros((1, 1), np.uint8)), *of_output(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8)))
