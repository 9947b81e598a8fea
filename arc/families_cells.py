"""Families whose rule is about a cell and what lies around it, or about a row or column of cells."""

import numpy as np

from arc.cells import NEAR, Cells, blank, box, boxes, ink, noise, objects, place
from arc.family import Family

COLOURS = tuple(range(1, 10))
LINES = ("row", "column", "both")
STAMPS = {
    "plus": NEAR,
    "corners": ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    "left and right": ((0, -1), (0, 1)),
    "up and down": ((-1, 0), (1, 0)),
}


def _painting(*kinds):
    """The variants of a rule that paints: what it looks at, with each colour."""
    return tuple((kind, colour) for kind in kinds for colour in COLOURS)


def _painted(cells: Cells, mask: np.ndarray, colour: int) -> Cells:
    return np.where(mask, colour, cells).astype(np.uint8)


def _seen(cells: Cells, step: tuple[int, int]) -> np.ndarray:
    """Whether the cell that lies a step away is coloured; beyond the edge none is."""
    (rows, cols), (down, right) = cells.shape, step
    return np.pad(cells != 0, 1)[1 + down : 1 + down + rows, 1 + right : 1 + right + cols]


def _draw_dots(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells:
    """One to three dots of one colour, whose lines may cross without an order."""
    cells = blank(rows, cols)
    number = int(rng.integers(1, min(rows, cols, 3) + 1))
    cells[rng.permutation(rows)[:number], rng.permutation(cols)[:number]] = ink(rng)
    return cells


def _diagonals(cells: Cells, variant: str) -> Cells:
    rows, cols = np.indices(cells.shape)
    drawn = cells.copy()
    for row, col in np.argwhere(cells):
        if variant != "rising":
            drawn[rows - cols == row - col] = cells[row, col]
        if variant != "falling":
            drawn[rows + cols == row + col] = cells[row, col]
    return drawn


def _draw_majorities(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells:
    """In each line more than half of the cells are of one colour."""
    palette = rng.permutation(COLOURS)[:4]
    lines = rng.choice(palette, (rows, cols) if variant == "row" else (cols, rows)).astype(np.uint8)
    for line in lines:
        most = int(rng.integers(line.size // 2 + 1, line.size + 1))
        line[rng.permutation(line.size)[:most]] = rng.choice(palette)
    return lines if variant == "row" else lines.T


def _majority(cells: Cells, variant: str) -> Cells:
    lines = cells if variant == "row" else cells.T
    most = np.asarray([np.bincount(line, minlength=10).argmax() for line in lines], np.uint8)
    found = np.repeat(most[:, None], lines.shape[1], 1)
    return found if variant == "row" else found.T


def _draw_in_one_colour(rng: np.random.Generator, rows: int, cols: int, variant: tuple[object, int]) -> Cells:
    return np.where(rng.random((rows, cols)) < 0.55, ink(rng, variant[1]), 0).astype(np.uint8)


def _mark_neighbours(cells: Cells, variant: tuple[int, int]) -> Cells:
    number = sum(_seen(cells, step).astype(int) for step in NEAR)
    return _painted(cells, (cells != 0) & (number == variant[0]), variant[1])


def _draw_noise(rng: np.random.Generator, rows: int, cols: int, variant: object) -> Cells:
    return noise(rng, rows, cols, 0.7)


def _every_second(cells: Cells, variant: tuple[tuple[str, int], int]) -> Cells:
    (which, start), colour = variant
    rows, cols = np.indices(cells.shape)
    place_of = {"row": rows, "column": cols, "both": rows + cols}[which]
    return _painted(cells, (cells != 0) & (place_of % 2 == start), colour)


def _edge(cells: Cells, side: str) -> Cells:
    return {"left": cells[:, :1], "right": cells[:, -1:], "up": cells[:1], "down": cells[-1:]}[side]


def _draw_keyed(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells:
    """Cells of one colour, and at one edge the colour that each line is to take."""
    body = ink(rng)
    cells = np.where(rng.random((rows, cols)) < 0.6, body, 0).astype(np.uint8)
    edge = _edge(cells, variant)
    edge[...] = rng.choice([colour for colour in COLOURS if colour != body], edge.shape)
    return cells


def _draw_single(rng: np.random.Generator, rows: int, cols: int, variant: tuple[str, int]) -> Cells:
    return boxes(rng, rows, cols, int(rng.integers(1, 4)), [ink(rng, variant[1])], (1, 1))


def _stamped(cells: Cells, variant: tuple[str, int]) -> Cells:
    near = np.logical_or.reduce([_seen(cells, step) for step in STAMPS[variant[0]]])
    return _painted(cells, near & (cells == 0), variant[1])


def _draw_thick(rng: np.random.Generator, rows: int, cols: int, variant: int) -> Cells | None:
    most = min(rows, cols, 6)
    if most < 3:
        return None
    return boxes(rng, rows, cols, int(rng.integers(1, 4)), [ink(rng, variant), ink(rng, variant)], (3, most))


def _hollow(cells: Cells, variant: int) -> Cells:
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return _painted(cells, np.logical_and.reduce([_seen(cells, step) for step in steps]), variant)


def _draw_spans(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells | None:
    """Two opposite corners of rectangles that do not touch, each of its own colour."""
    most = min(rows, cols, 5)
    if most < 2:
        return None
    cells, taken = blank(rows, cols), blank(rows, cols)
    for colour in rng.permutation(COLOURS)[: int(rng.integers(1, 4))]:
        height, width = (int(side) for side in rng.integers(2, most + 1, 2))
        where = place(rng, taken, height, width)
        if where is not None:
            taken[where] = colour
            cells[where][[0, -1], [0, -1] if rng.random() < 0.5 else [-1, 0]] = colour
    return cells


def _spanned(cells: Cells, variant: str) -> Cells:
    drawn = cells.copy()
    for colour in np.unique(cells[cells != 0]):
        inside = drawn[box(cells == colour)]
        if variant == "full":
            inside[...] = colour
        else:
            inside[[0, -1]] = colour
            inside[:, [0, -1]] = colour
    return drawn


def _draw_gaps(rng: np.random.Generator, rows: int, cols: int, variant: tuple[str, int]) -> Cells:
    cells = _draw_in_one_colour(rng, rows, cols, variant)
    cells[rng.random(rows) < 0.3] = 0
    cells[:, rng.random(cols) < 0.3] = 0
    return cells


def _empty_lines(cells: Cells, variant: tuple[str, int]) -> Cells:
    rows, cols = ~cells.any(1, keepdims=True), ~cells.any(0, keepdims=True)
    mask = {"row": rows | np.zeros_like(cols), "column": np.zeros_like(rows) | cols, "both": rows | cols}[variant[0]]
    return _painted(cells, mask, variant[1])


def _draw_edged(rng: np.random.Generator, rows: int, cols: int, variant: tuple[str, int]) -> Cells:
    """Objects of which those drawn with a margin do not touch the edge."""
    cells, colour = blank(rows, cols), ink(rng, variant[1])
    for _ in range(int(rng.integers(2, 6))):
        height, width = (int(side) for side in rng.integers(1, 4, 2))
        where = place(rng, cells, height, width, margin=int(rng.integers(0, 2)))
        if where is not None:
            cells[where] = colour
    return cells


def _mark_edge(cells: Cells, variant: tuple[str, int]) -> Cells:
    marked = cells.copy()
    for mask in objects(cells):
        touching = bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())
        if touching == (variant[0] == "touching"):
            marked[mask] = variant[1]
    return marked


CELLS = (
    Family("draw_diagonals", "Diagonals go through every cell.", _draw_dots, _diagonals, ("falling", "rising", "both")),
    Family("majority", "Every line takes the colour of most of its cells.", _draw_majorities, _majority,
           ("row", "column")),
    Family("mark_neighbours", "Cells with a certain number of coloured neighbours are painted.", _draw_in_one_colour,
           _mark_neighbours, _painting(0, 1, 2, 3)),
    Family("every_second", "Coloured cells in every second row, column or square are painted.", _draw_noise,
           _every_second, _painting(*((line, start) for line in LINES for start in (0, 1)))),
    Family("take_colour", "Every line takes the colour at its end.", _draw_keyed,
           lambda g, v: np.where(g != 0, _edge(g, v), 0), ("left", "right", "up", "down")),
    Family("stamp", "A pattern is drawn around every cell.", _draw_single, _stamped, _painting(*STAMPS)),
    Family("hollow", "Objects change where they have no edge.", _draw_thick, _hollow, (0, *COLOURS)),
    Family("span_rectangle", "Two cells of one colour are the corners of a rectangle.", _draw_spans, _spanned,
           ("full", "edge")),
    Family("empty_lines", "Rows or columns that are all black are painted.", _draw_gaps, _empty_lines,
           _painting(*LINES)),
    Family("mark_edge", "Objects that touch the edge are painted, or those that do not.", _draw_edged, _mark_edge,
           _painting("touching", "inside")),
)  # fmt: skip
