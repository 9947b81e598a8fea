"""A grid as a small SVG: one path for each colour, so that hundreds fit on a page, and its rows in words beside it."""

from collections.abc import Iterable
from html import escape

import numpy as np
from jaxtyping import Bool, UInt8

# fchollet/ARC-AGI, apps/css/common.css
PALETTE = (
    "#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25",
)  # fmt: skip
_LINES = "#555555"
_SIDE = 240  # pixels of the longer side at most, unless cells would be too small to see
_CELL = range(5, 19)  # pixels of a cell


def svg(grid: UInt8[np.ndarray, "_rows _cols"], title: str = "", marks: Bool[np.ndarray, "_rows _cols"] | None = None,
        cell: int | None = None) -> str:  # fmt: skip
    """The grid with a frame around each marked cell; `cell` is a cell's width in pixels, by default by the grid's size."""
    rows, cols = grid.shape
    cell = min(_CELL[-1], max(_CELL[0], _SIDE // max(rows, cols, 1))) if cell is None else cell
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(in_words(grid, title), quote=True)}" '
        f'width="{cols * cell}" height="{rows * cell}" viewBox="0 0 {cols} {rows}" style="max-width:100%;height:auto">'
    ]
    for colour in np.unique(grid).tolist():
        parts.append(f'<path fill="{PALETTE[colour]}" d="{_runs(grid == colour)}"/>')
    across = "".join(f"M0 {row}h{cols}" for row in range(rows + 1))
    down = "".join(f"M{col} 0v{rows}" for col in range(cols + 1))
    parts.append(f'<path fill="none" stroke="{_LINES}" stroke-width=".06" d="{across}{down}"/>')
    if marks is not None and marks.any():
        frames = "".join(f"M{col + 0.16:g} {row + 0.16:g}h.68v.68h-.68z" for row, col in np.argwhere(marks).tolist())
        for ink, width in (("#000000", ".24"), ("#ffffff", ".12")):  # seen on every colour
            parts.append(f'<path fill="none" stroke="{ink}" stroke-width="{width}" d="{frames}"/>')
    return "".join([*parts, "</svg>"])


def figure(
    grid: UInt8[np.ndarray, "_rows _cols"] | None,
    title: str,
    marks: Bool[np.ndarray, "_rows _cols"] | None = None,
    cell: int | None = None,
) -> str:
    """The grid under its title; a question mark where there is none."""
    inside = '<span style="font-size:2em">?</span>' if grid is None else svg(grid, title, marks, cell)
    return f'<figure style="margin:0"><figcaption>{escape(title)}</figcaption>{inside}</figure>'


def in_row(figures: Iterable[str]) -> str:
    """Figures beside one another, wrapped where the page ends."""
    return f'<div style="display:flex;flex-wrap:wrap;gap:10px 16px;align-items:flex-start">{"".join(figures)}</div>'


def in_words(grid: UInt8[np.ndarray, "_rows _cols"], title: str = "") -> str:
    """Size and rows, a digit a cell, as a screen reader says them."""
    rows = ", ".join("".join(map(str, row)) for row in grid.tolist())
    size = f"{grid.shape[0]} by {grid.shape[1]} cells: {rows}"
    return f"{title}, {size}" if title else size


def _runs(mask: Bool[np.ndarray, "_rows _cols"]) -> str:
    """A path that covers the mask, a rectangle for each run of cells in a row."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    begins, ends = np.argwhere(edges == 1).tolist(), np.argwhere(edges == -1).tolist()
    return "".join(
        f"M{col} {row}h{stop - col}v1h{col - stop}z" for (row, col), (_, stop) in zip(begins, ends, strict=True)
    )
