"""A Grid is a NumPy uint8 array of 1 to 30 rows and columns of colours 0 to 9, read-only once validated.

It stays an array, so every NumPy function works on it, and a notebook shows it in colours; `as_grid` is the only door
from the outside.
"""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from arc import drawing
from arc.errors import InputError

MAX_SIDE = 30
COLOURS = 10
COLOUR_NAMES = ("black", "blue", "red", "green", "yellow", "grey", "pink", "orange", "teal", "maroon")

# The underscores keep two grids of one call from having to share their sides.
Grid = UInt8[np.ndarray, "_rows _cols"]


class _Shown(np.ndarray):
    """An array that a notebook draws; what is computed from it is a plain array."""

    def __array_wrap__(self, array: np.ndarray, context: Any = None, return_scalar: bool = False) -> Any:
        return array[()] if return_scalar else array

    def __repr__(self) -> str:
        return repr(self.view(np.ndarray))

    def _repr_html_(self) -> str | None:
        """None, which leaves the plain text, of a part that is no grid."""
        sides = self.ndim == 2 and all(1 <= side <= MAX_SIDE for side in self.shape)
        if not sides or self.dtype != np.uint8 or self.max(initial=0) >= COLOURS:
            return None
        return drawing.svg(self)


def size_of(grid: Grid | None) -> str:
    """Its sides, as they are printed: 3x5, or ? for a grid that is withheld."""
    return "?" if grid is None else f"{grid.shape[0]}x{grid.shape[1]}"


def as_grid(value: object, where: str = "grid") -> Grid:
    """Validate a list of lists of integers, or a 2-D integer array; `where` opens the error line."""
    if isinstance(value, np.ndarray):
        if value.ndim != 2 or value.dtype.kind not in "iu":
            raise InputError(f"{where}: found a {value.ndim}-D {value.dtype} array, expected a 2-D integer array")
        array = value
    else:
        array = _from_lists(value, where)
    rows, cols = array.shape
    if not (1 <= rows <= MAX_SIDE and 1 <= cols <= MAX_SIDE):
        raise InputError(f"{where}: found {rows} x {cols} cells, expected 1 to {MAX_SIDE} rows and columns")
    outside = np.argwhere((array < 0) | (array >= COLOURS))
    if outside.size:
        row, col = outside[0]
        raise _bad_cell(where, int(row), int(col), array[row, col])
    grid = array.astype(np.uint8, order="C")  # always a copy: freezing must not freeze the caller's array
    grid.flags.writeable = False
    return grid.view(_Shown)


def _from_lists(value: object, where: str) -> np.ndarray:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: found {_kind(value)}, expected a list of rows")
    width = None
    for r, row in enumerate(value):
        if not isinstance(row, list | tuple):
            raise InputError(f"{where}, row {r}: found {_kind(row)}, expected a list of integers")
        width = len(row) if width is None else width
        if len(row) != width:
            raise InputError(f"{where}, row {r}: found {len(row)} cells, expected {width} as in row 0")
        for c, cell in enumerate(row):
            # bool is an int to Python, and a data set that holds one is broken
            if (type(cell) is not int and not isinstance(cell, np.integer)) or not 0 <= cell < COLOURS:
                raise _bad_cell(where, r, c, cell)
    return np.array(value, dtype=np.uint8).reshape(len(value), width or 0)


def _bad_cell(where: str, row: int, col: int, cell: object) -> InputError:
    shown = _kind(cell) if isinstance(cell, list | tuple | dict | str) else cell
    return InputError(f"{where}, cell row {row} column {col}: found {shown}, expected an integer 0 to 9")


def _kind(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
