"""Tasks and predictions to look at: in the terminal, as SVG and as PNG, in the official colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from arc.canvas import Canvas, rgb
from arc.drawing import PALETTE
from arc.errors import InputError
from arc.files import write_text
from arc.grid import Grid
from arc.task import Task

LINES, MARK, GAP, TEXT = "#555555", "#ffffff", 14, 12


@dataclass(frozen=True)
class Panel:
    """One grid of a picture: `marks` are cells to point at, `values` are drawn as inner squares, larger is more."""

    title: str
    grid: Grid | None
    marks: Bool[np.ndarray, "_rows _cols"] | None = None
    values: Float[np.ndarray, "_rows _cols"] | None = None

    def __post_init__(self):
        for name in ("marks", "values"):
            given = getattr(self, name)
            if given is not None and (self.grid is None or given.shape != self.grid.shape):
                shape = None if self.grid is None else self.grid.shape
                raise InputError(f"panel {self.title!r}, {name}: found shape {given.shape}, expected {shape}")


Page = Sequence[Sequence[Panel]]
"""Rows of panels."""


def task_page(task: Task) -> list[list[Panel]]:
    """One row per pair, training pairs first."""
    rows = []
    for part in ("train", "test"):
        for index, pair in enumerate(getattr(task, part)):
            rows.append([Panel(f"{part} {index} in", pair.input), Panel(f"{part} {index} out", pair.output)])
    return rows


def prediction_row(title: str, asked: Grid, predicted: Grid | None, truth: Grid | None) -> list[Panel]:
    """Input, prediction and truth; where the two differ is marked in both, all of it where their shapes do."""
    marks = [None, None]
    if predicted is not None and truth is not None:
        alike = predicted.shape == truth.shape
        marks = [predicted != truth] * 2 if alike else [np.ones(grid.shape, bool) for grid in (predicted, truth)]
    right = predicted is not None and truth is not None and np.array_equal(predicted, truth)
    said = "no grid" if predicted is None else "right" if right else "predicted" if truth is None else "wrong"
    return [Panel(title, asked), Panel(said, predicted, marks[0]), Panel("truth", truth, marks[1])]


def value_panel(title: str, grid: Grid, values: np.ndarray) -> Panel:
    """A value per cell over its grid."""
    return Panel(title, grid, values=np.asarray(values, np.float64))


def page_of(panels: Sequence[Panel], columns: int = 6) -> list[list[Panel]]:
    """Many panels in rows of `columns`."""
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def canvas(page: Page, cell: int = 16) -> Canvas:
    """The page laid out, every cell `cell` pixels wide."""
    rows = [list(row) for row in page]
    if not rows or not all(rows):
        raise InputError("page: found an empty page or row, expected panels")
    values = [np.abs(panel.values) for row in rows for panel in row if panel.values is not None]
    finite = [v[np.isfinite(v)].max(initial=0.0) for v in values]
    top = max(finite, default=0.0) or 1.0  # one scale for the page: its panels can be compared
    sizes = [[_size(panel, cell) for panel in row] for row in rows]
    width = max(sum(w + GAP for w, _ in row) for row in sizes) + GAP
    height = sum(max(h for _, h in row) + GAP for row in sizes) + GAP
    page_canvas = Canvas(width, height)
    y = GAP
    for row, row_sizes in zip(rows, sizes, strict=True):
        x = GAP
        for panel, (panel_width, _) in zip(row, row_sizes, strict=True):
            _draw(page_canvas, panel, x, y, cell, top)
            x += panel_width + GAP
        y += max(h for _, h in row_sizes) + GAP
    return page_canvas


def _size(panel: Panel, cell: int) -> tuple[int, int]:
    rows, cols = (2, 2) if panel.grid is None else panel.grid.shape
    return max(cols * cell + 1, len(panel.title) * 8), rows * cell + 1 + TEXT + 4


def _draw(page: Canvas, panel: Panel, x: int, y: int, cell: int, top: float) -> None:
    page.text(x, y, TEXT, panel.title)
    y += TEXT + 4
    if panel.grid is None:
        page.frame(x, y, 2 * cell + 1, 2 * cell + 1, "#bbbbbb", 1)
        page.text(x + cell - 3, y + cell - 5, TEXT, "?")
        return
    rows, cols = panel.grid.shape
    page.rect(x, y, cols * cell + 1, rows * cell + 1, LINES)
    for (row, col), colour in np.ndenumerate(panel.grid):
        left, up = x + col * cell + 1, y + row * cell + 1
        page.rect(left, up, cell - 1, cell - 1, PALETTE[colour])
        if panel.marks is not None and panel.marks[row, col]:
            page.frame(left, up, cell - 1, cell - 1, MARK, 2)
            page.frame(left + 2, up + 2, cell - 5, cell - 5, "#000000", 1)
        if panel.values is not None:
            _draw_value(page, float(panel.values[row, col]) / top, left, up, cell - 1)


def _draw_value(page: Canvas, share: float, x: int, y: int, room: int) -> None:
    """A square whose area is the share of the largest value; white is positive, black with a white edge negative."""
    side = round((room - 2) * min(1.0, abs(share)) ** 0.5) if np.isfinite(share) else 0
    if side < 1:
        return
    inset = (room - side) // 2
    page.rect(x + inset - 1, y + inset - 1, side + 2, side + 2, "#000000" if share > 0 else "#ffffff")
    page.rect(x + inset, y + inset, side, side, "#ffffff" if share > 0 else "#000000")


def ansi(page: Page) -> str:
    """The page for a terminal with 24-bit colours; marked cells show `××`, values their digit from 0 to 9."""
    values = [np.abs(p.values) for row in page for p in row if p.values is not None]
    top = max((v[np.isfinite(v)].max(initial=0.0) for v in values), default=0.0) or 1.0
    lines = []
    for row in page:
        blocks = [_ansi_panel(panel, top) for panel in row]
        height = max(len(block) for block, _ in blocks)
        for index in range(height):
            cells = [block[index] if index < len(block) else " " * width for block, width in blocks]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines)


def _ansi_panel(panel: Panel, top: float) -> tuple[list[str], int]:
    cols = 1 if panel.grid is None else panel.grid.shape[1]
    width = max(2 * cols, len(panel.title))
    lines = [panel.title.ljust(width)]
    if panel.grid is None:
        return [*lines, "?".ljust(width)], width
    for index, row in enumerate(panel.grid.tolist()):
        text = "".join(_ansi_cell(panel, index, col, colour, top) for col, colour in enumerate(row))
        lines.append(text + "\x1b[0m" + " " * (width - 2 * cols))
    return lines, width


def _ansi_cell(panel: Panel, row: int, col: int, colour: int, top: float) -> str:
    red, green, blue = rgb(PALETTE[colour])
    ink = "0;0;0" if red * 3 + green * 6 + blue > 1275 else "255;255;255"
    shown = "  "
    if panel.marks is not None and panel.marks[row, col]:
        shown = "××"
    elif panel.values is not None:
        value = float(panel.values[row, col]) / top
        shown = f"{'-' if value < 0 else ' '}{min(9, int(abs(value) * 9.999))}" if np.isfinite(value) else " ?"
    return f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;{ink}m{shown}"


def save(path: str | Path, page: Page, cell: int = 16) -> None:
    """Write `.svg` or `.png`, by the path's ending."""
    path = Path(path)
    if path.suffix == ".svg":
        write_text(path, canvas(page, cell).svg())
    elif path.suffix == ".png":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(canvas(page, cell).png())
    else:
        raise InputError(f"{path}: found {path.suffix or 'no ending'}, expected .svg or .png")
