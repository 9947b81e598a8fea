"""Families whose rule treats the grid as a whole: symmetries, repetition, panels, movement."""

import numpy as np

from arc.cells import Cells, blank, ink, noise
from arc.family import Family

COLOURS = tuple(range(1, 10))
SIDES = ("down", "right", "up", "left")
STEPS = tuple((row, col) for row in (-1, 0, 1) for col in (-1, 0, 1) if (row, col) != (0, 0))


def _noise(rng: np.random.Generator, rows: int, cols: int, variant: object) -> Cells:
    return noise(rng, rows, cols)


def _shrunk(divide):
    """Noise small enough that the output still fits."""

    def draw(rng: np.random.Generator, rows: int, cols: int, variant) -> Cells:
        down, across = divide(variant)
        return noise(rng, max(1, rows // down), max(1, cols // across), 0.7)

    return draw


def _kaleidoscope(cells: Cells, variant: str) -> Cells:
    wide = cells if variant == "down" else np.hstack([cells, cells[:, ::-1]])
    return wide if variant == "right" else np.vstack([wide, wide[::-1]])


def _draw_even(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells | None:
    rows, cols = rows - rows % 2, cols - cols % 2
    return noise(rng, rows, cols) if rows and cols else None


def _half(cells: Cells, variant: str) -> Cells:
    rows, cols = cells.shape[0] // 2, cells.shape[1] // 2
    return {"up": cells[:rows], "down": cells[-rows:], "left": cells[:, :cols], "right": cells[:, -cols:]}[variant]


def _draw_periodic(rng: np.random.Generator, rows: int, cols: int, variant: None) -> Cells | None:
    if min(rows, cols) < 4:
        return None
    high, wide = (int(rng.integers(1, side // 2 + 1)) for side in (min(rows, 8), min(cols, 8)))
    pattern = noise(rng, high, wide, 1.0)
    whole = np.tile(pattern, (rows // high + 1, cols // wide + 1))[:rows, :cols]
    masked = _masked(rng, whole)
    return masked if np.array_equal(_continue_period(masked, None), whole) else None


def _masked(rng: np.random.Generator, cells: Cells) -> Cells:
    """A rectangle of at most half of each side made black."""
    rows, cols = cells.shape
    height, width = (int(rng.integers(1, max(2, side // 2 + 1))) for side in (rows, cols))
    top, left = int(rng.integers(0, rows - height + 1)), int(rng.integers(0, cols - width + 1))
    masked = cells.copy()
    masked[top : top + height, left : left + width] = 0
    return masked


def _continue_period(cells: Cells, variant: None) -> Cells:
    """Fill black cells by the smallest pattern whose repetition agrees with all others."""
    rows, cols = cells.shape
    periods = sorted(((p, q) for p in range(1, rows + 1) for q in range(1, cols + 1)), key=lambda s: (s[0] * s[1], s))
    for high, wide in periods:
        pattern = blank(high, wide)
        for row in range(high):
            for col in range(wide):
                seen = cells[row::high, col::wide]
                pattern[row, col] = seen.max()
        whole = np.tile(pattern, (rows // high + 1, cols // wide + 1))[:rows, :cols]
        if pattern.all() and np.array_equal(np.where(cells == 0, whole, cells), whole):
            return whole
    return cells


def _draw_symmetric(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells | None:
    cells = noise(rng, rows, cols, 1.0, 4)
    whole = np.maximum(cells, _mirrored(cells, variant))
    masked = _masked(rng, whole)
    return masked if np.array_equal(_complete(masked, variant), whole) else None


def _mirrored(cells: Cells, variant: str) -> Cells:
    return cells[:, ::-1] if variant == "left and right" else cells[::-1]


def _complete(cells: Cells, variant: str) -> Cells:
    return np.where(cells == 0, _mirrored(cells, variant), cells)


def _turned(cells: Cells, side: str) -> Cells:
    """The grid turned so that `side` lies at the bottom."""
    return np.rot90(cells, -SIDES.index(side))


def _turned_back(cells: Cells, side: str) -> Cells:
    return np.rot90(cells, SIDES.index(side))


def _draw_loose(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells:
    return noise(rng, rows, cols, 0.3)


def _fall(cells: Cells, side: str) -> Cells:
    turned = _turned(cells, side)
    fallen = np.zeros_like(turned)
    for col in range(turned.shape[1]):
        column = turned[:, col][turned[:, col] != 0]
        if column.size:
            fallen[-column.size :, col] = column
    return _turned_back(fallen, side)


def _draw_dots(rng: np.random.Generator, rows: int, cols: int, variant: object) -> Cells:
    cells = blank(rows, cols)
    for _ in range(int(rng.integers(1, 4))):
        cells[rng.integers(rows), rng.integers(cols)] = ink(rng)
    return cells


def _extend(cells: Cells, side: str) -> Cells:
    """Every coloured cell colours the black ones below it, up to the next coloured one."""
    turned = _turned(cells, side).copy()
    for row in range(1, turned.shape[0]):
        turned[row] = np.where(turned[row] == 0, turned[row - 1], turned[row])
    return _turned_back(turned, side)


def _draw_panels(rng: np.random.Generator, rows: int, cols: int, variant: int) -> Cells | None:
    width = (cols - 1) // 2
    if width < 1:
        return None
    line, left, right = (int(c) for c in rng.permutation([c for c in COLOURS if c != variant])[:3])
    masks = rng.random((2, rows, width)) < 0.5
    return np.hstack(
        [np.where(masks[0], left, 0), np.full((rows, 1), line), np.where(masks[1], right, 0)]
    ).astype(np.uint8)  # fmt: skip


def _panels(operation):
    def solve(cells: Cells, variant: int) -> Cells:
        width = cells.shape[1] // 2
        mask = operation(cells[:, :width] != 0, cells[:, -width:] != 0) if width else cells != 0
        return np.where(mask, variant, 0).astype(np.uint8)

    return solve


def _framed(cells: Cells, variant: int) -> Cells:
    framed = cells.copy()
    framed[[0, -1]] = variant
    framed[:, [0, -1]] = variant
    return framed


def _draw_bars(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells:
    cells = blank(rows, cols)
    for col, height in enumerate(rng.integers(1, rows + 1, cols)):
        cells[rows - height :, col] = ink(rng)
    heights = (cells != 0).sum(0)
    # bars of one height are of one colour: their order must not matter
    for col in range(cols):
        cells[:, col] = cells[:, int(np.flatnonzero(heights == heights[col])[0])]
    return cells


def _sorted(cells: Cells, variant: str) -> Cells:
    order = np.argsort((cells != 0).sum(0), kind="stable")
    return cells[:, order if variant == "rising" else order[::-1]]


WHOLE = (
    Family("mirror", "The grid is mirrored.", _noise, lambda g, v: np.flip(g, v), (0, 1)),
    Family("rotate", "The grid is turned by quarter turns.", _noise, lambda g, v: np.rot90(g, v), (1, 2, 3)),
    Family("transpose", "The grid is mirrored at a diagonal.", _noise,
           lambda g, v: g.T if v == "main" else g[::-1, ::-1].T, ("main", "other")),
    Family("translate", "Every cell moves by one, and comes back in on the other side.", _noise,
           lambda g, v: np.roll(g, v, (0, 1)), STEPS),
    Family("scale", "Every cell becomes a square.", _shrunk(lambda v: (v, v)),
           lambda g, v: np.kron(g, np.ones((v, v), np.uint8)), (2, 3)),
    Family("tile", "The grid is laid out several times.", _shrunk(lambda v: v), lambda g, v: np.tile(g, v),
           ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))),
    Family("kaleidoscope", "The grid is joined with its mirror images.",
           _shrunk(lambda v: {"right": (1, 2), "down": (2, 1), "both": (2, 2)}[v]), _kaleidoscope,
           ("right", "down", "both")),
    Family("keep_half", "One half of the grid stays.", _draw_even, _half, SIDES),
    Family("repeat_pattern", "The pattern goes on where the grid is black.", _draw_periodic, _continue_period),
    Family("complete_symmetry", "What the black rectangle hides is the mirror image of the other side.",
           _draw_symmetric, _complete, ("left and right", "up and down")),
    Family("gravity", "All cells fall to one side.", _draw_loose, _fall, SIDES),
    Family("extend_line", "Every cell draws a line to one side, until something is in the way.", _draw_dots, _extend,
           SIDES),
    Family("panel_and", "Cells that are coloured in both panels.", _draw_panels, _panels(np.logical_and), COLOURS),
    Family("panel_or", "Cells that are coloured in either panel.", _draw_panels, _panels(np.logical_or), COLOURS),
    Family("panel_xor", "Cells that are coloured in just one panel.", _draw_panels, _panels(np.logical_xor), COLOURS),
    Family("frame", "A frame is drawn along the edge.", _noise, _framed, COLOURS),
    Family("sort", "The bars are sorted by height.", _draw_bars, _sorted, ("rising", "falling")),
)  # fmt: skip
