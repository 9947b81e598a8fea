"""Families whose rule is about colours and objects: groups of neighbouring cells on black."""

import numpy as np

from arc.cells import AROUND, Cells, blank, box, boxes, flood, ink, noise, objects, place
from arc.family import Family

COLOURS = tuple(range(1, 10))


def _draw_with(*positions: int):
    """Noise that holds the colours at these places of the variant."""

    def draw(rng: np.random.Generator, rows: int, cols: int, variant: tuple[int, int]) -> Cells:
        cells = noise(rng, rows, cols)
        for position in positions:
            cells[rng.integers(rows), rng.integers(cols)] = variant[position]
        return cells

    return draw


def _recoloured(cells: Cells, variant: tuple[int, int]) -> Cells:
    return np.where(cells == variant[0], variant[1], cells).astype(np.uint8)


def _swapped(cells: Cells, variant: tuple[int, int]) -> Cells:
    map_ = np.arange(10, dtype=np.uint8)
    map_[list(variant)] = variant[::-1]
    return map_[cells]


def _draw_blob(rng: np.random.Generator, rows: int, cols: int, variant: None) -> Cells | None:
    height, width = (int(rng.integers(1, max(2, side))) for side in (rows, cols))
    cells = blank(rows, cols)
    where = place(rng, cells, height, width)
    if where is None:
        return None
    cells[where] = noise(rng, height, width, 0.7)
    return cells if len(objects(cells)) == 1 else None


def _cropped(cells: Cells, variant: None) -> Cells:
    return cells[box(cells != 0)] if cells.any() else cells


def _draw_countable(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells:
    return boxes(rng, rows, cols, int(rng.integers(1, max(rows, cols) + 1)), [ink(rng)], (1, 2))


def _counted(cells: Cells, variant: str) -> Cells:
    bar = np.full((1, max(1, len(objects(cells)))), cells.max(), np.uint8)
    return bar if variant == "row" else bar.T


def _draw_pairs(rng: np.random.Generator, rows: int, cols: int, variant: None) -> Cells | None:
    if cols < 3:
        return None
    cells = blank(rows, cols)
    for row in rng.permutation(rows)[: int(rng.integers(1, max(2, rows // 2)))]:
        left = int(rng.integers(0, cols - 2))
        cells[row, [left, int(rng.integers(left + 2, cols))]] = ink(rng)
    return cells if rng.random() < 0.5 or cells.shape[0] != cells.shape[1] else np.ascontiguousarray(cells.T)


def _joined(cells: Cells, variant: None) -> Cells:
    """Two cells of one colour, alone in their row or column, are joined."""
    drawn = cells.copy()
    for source, target in ((cells, drawn), (cells.T, drawn.T)):
        for line, out in zip(source, target, strict=True):
            ends = np.flatnonzero(line)
            if ends.size == 2 and line[ends[0]] == line[ends[1]]:
                out[ends[0] : ends[1] + 1] = line[ends[0]]
    return drawn


def _draw_dots(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells:
    """Dots in different rows and columns, so that their lines cross only in black cells."""
    cells = blank(rows, cols)
    number = int(rng.integers(1, min(rows, cols, 3) + 1))
    colour = ink(rng)  # one colour: crossings have no order
    cells[rng.permutation(rows)[:number], rng.permutation(cols)[:number]] = colour
    return cells


def _lined(cells: Cells, variant: str) -> Cells:
    drawn = cells.copy()
    for row, col in np.argwhere(cells):
        if variant != "column":
            drawn[row] = cells[row, col]
        if variant != "row":
            drawn[:, col] = cells[row, col]
    return drawn


def _draw_rings(rng: np.random.Generator, rows: int, cols: int, variant: int) -> Cells | None:
    if min(rows, cols) < 3:
        return None
    cells = blank(rows, cols)
    for _ in range(int(rng.integers(1, 4))):
        height, width = (int(rng.integers(3, min(side, 6) + 1)) for side in (rows, cols))
        where = place(rng, cells, height, width)
        if where is not None:
            cells[where] = ink(rng, variant)
            inside = cells[where][1:-1, 1:-1]
            inside[...] = 0
            if rng.random() < 0.3:  # a gap lets the outside in
                cells[where][0, int(rng.integers(1, width - 1))] = 0
    return cells


def _filled(cells: Cells, variant: int) -> Cells:
    padded = np.pad(cells == 0, 1, constant_values=True)
    outside = flood(padded, [(0, 0)])[1:-1, 1:-1]
    return np.where((cells == 0) & ~outside, variant, cells).astype(np.uint8)


def _draw_boxes(rng: np.random.Generator, rows: int, cols: int, variant: int) -> Cells:
    return boxes(rng, rows, cols, int(rng.integers(1, 4)), [ink(rng, variant)], (1, 3), margin=1)


def _outlined(cells: Cells, variant: int) -> Cells:
    padded = np.pad(cells != 0, 1)
    rows, cols = cells.shape
    near = np.zeros_like(cells, bool)
    for dr, dc in AROUND:
        near |= padded[1 + dr : 1 + dr + rows, 1 + dc : 1 + dc + cols]
    return np.where(near & (cells == 0), variant, cells).astype(np.uint8)


def _draw_sizes(rng: np.random.Generator, rows: int, cols: int, variant: object) -> Cells | None:
    """At least two objects, with one largest and one smallest."""
    without = variant if isinstance(variant, int) else 0
    cells = boxes(rng, rows, cols, int(rng.integers(2, 6)), [ink(rng, without), ink(rng, without)], (1, 4))
    sizes = sorted(int(mask.sum()) for mask in objects(cells))
    unique = len(sizes) > 1 and sizes[0] < sizes[1] and sizes[-2] < sizes[-1]
    return cells if unique else None


def _by_size(cells: Cells, which: str) -> np.ndarray:
    rising = sorted(objects(cells), key=lambda mask: int(mask.sum()))
    return (rising[-1] if which == "largest" else rising[0]) if rising else cells != 0


def _draw_noisy(rng: np.random.Generator, rows: int, cols: int, variant: None) -> Cells:
    cells = boxes(rng, rows, cols, int(rng.integers(1, 4)), [ink(rng)], (2, 4))
    for _ in range(int(rng.integers(1, 5))):
        where = place(rng, cells, 1, 1)
        if where is not None:
            cells[where] = ink(rng)
    return cells


def _denoised(cells: Cells, variant: None) -> Cells:
    clean = cells.copy()
    for mask in objects(cells):
        if mask.sum() == 1:
            clean[mask] = 0
    return clean


def _draw_counted_colours(rng: np.random.Generator, rows: int, cols: int, variant: str) -> Cells | None:
    cells = noise(rng, rows, cols, 0.6, 3)
    counts = sorted(np.bincount(cells.ravel(), minlength=10)[1:])[::-1]
    present = [count for count in counts if count]
    unique = len(present) > 1 and present[0] > present[1] and present[-1] < present[-2]
    return cells if unique else None


def _commonest(cells: Cells, variant: str) -> Cells:
    counts = np.bincount(cells.ravel(), minlength=10)[1:].astype(float)
    counts[counts == 0] = np.nan
    if np.isnan(counts).all():
        return blank(1, 1)
    best = np.nanargmax(counts) if variant == "most" else np.nanargmin(counts)
    return np.full((1, 1), best + 1, np.uint8)


CHANGES = tuple((a, b) for a in COLOURS for b in (0, *COLOURS) if a != b)
SWAPS = tuple((a, b) for a in COLOURS for b in COLOURS if a < b)

OBJECTS = (
    Family("recolour", "One colour becomes another.", _draw_with(0), _recoloured, CHANGES),
    Family("swap_colours", "Two colours change places.", _draw_with(0, 1), _swapped, SWAPS),
    Family("crop_to_object", "The grid is cut to its object.", _draw_blob, _cropped),
    Family("count", "As many cells as there are objects.", _draw_countable, _counted, ("row", "column")),
    Family("join_pairs", "Two cells of one colour in a line are joined.", _draw_pairs, _joined),
    Family("draw_lines", "Lines go through every cell.", _draw_dots, _lined, ("row", "column", "cross")),
    Family("fill_enclosed", "Black that cannot reach the edge is filled.", _draw_rings, _filled, COLOURS),
    Family("outline", "Every object gets an outline.", _draw_boxes, _outlined, COLOURS),
    Family("largest_object", "Only the object of one extreme size stays.", _draw_sizes,
           lambda g, v: np.where(_by_size(g, v), g, 0), ("largest", "smallest")),
    Family("mark_largest", "The largest object is painted.", _draw_sizes,
           lambda g, v: np.where(_by_size(g, "largest"), v, g).astype(np.uint8), COLOURS),
    Family("crop_largest", "The grid is cut to the object of one extreme size.", _draw_sizes,
           lambda g, v: g[box(_by_size(g, v))] if g.any() else g, ("largest", "smallest")),
    Family("denoise", "Single cells disappear.", _draw_noisy, _denoised),
    Family("commonest_colour", "One cell of the colour that is most, or least, frequent.", _draw_counted_colours,
           _commonest, ("most", "least")),
)  # fmt: skip
