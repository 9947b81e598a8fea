"""Objects, floods and random cells: the vocabulary of the procedural tasks."""

import numpy as np

Cells = np.ndarray  # a grid under construction: rows x cols, uint8, not yet validated
NEAR = ((-1, 0), (1, 0), (0, -1), (0, 1))
AROUND = (*NEAR, (-1, -1), (-1, 1), (1, -1), (1, 1))


def blank(rows: int, cols: int) -> Cells:
    return np.zeros((rows, cols), np.uint8)


def ink(rng: np.random.Generator, *without: int) -> int:
    """A colour other than black and those given."""
    return int(rng.choice([colour for colour in range(1, 10) if colour not in without]))


def noise(rng: np.random.Generator, rows: int, cols: int, density: float = 0.5, colours: int = 3) -> Cells:
    """Cells of a few colours on black."""
    palette = rng.permutation(np.arange(1, 10))[:colours]
    return np.where(rng.random((rows, cols)) < density, rng.choice(palette, (rows, cols)), 0).astype(np.uint8)


def objects(cells: Cells, near: tuple[tuple[int, int], ...] = AROUND) -> list[np.ndarray]:
    """One mask per group of neighbouring cells that are not black, whatever their colours, in reading order."""
    left = cells != 0
    masks = []
    while left.any():
        start = tuple(np.argwhere(left)[0])
        mask = flood(left, [start], near)
        left &= ~mask
        masks.append(mask)
    return masks


def flood(open_: np.ndarray, starts: list, near: tuple[tuple[int, int], ...] = NEAR) -> np.ndarray:
    """The open cells that can be reached from the starts."""
    reached = np.zeros_like(open_, bool)
    stack = [tuple(map(int, start)) for start in starts if open_[tuple(start)]]
    for cell in stack:
        reached[cell] = True
    while stack:
        row, col = stack.pop()
        for dr, dc in near:
            r, c = row + dr, col + dc
            if 0 <= r < open_.shape[0] and 0 <= c < open_.shape[1] and open_[r, c] and not reached[r, c]:
                reached[r, c] = True
                stack.append((r, c))
    return reached


def box(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest rectangle around the cells of a mask."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)


def place(
    rng: np.random.Generator,
    cells: Cells,
    height: int,
    width: int,
    gap: int = 1,
    margin: int = 0,
) -> tuple[slice, slice] | None:
    """A black rectangle with `gap` black cells around it, `margin` cells from the edge."""
    rows, cols = cells.shape
    for _ in range(20):
        if rows - height < 2 * margin or cols - width < 2 * margin:
            return None
        top = int(rng.integers(margin, rows - height - margin + 1))
        left = int(rng.integers(margin, cols - width - margin + 1))
        around = cells[max(0, top - gap) : top + height + gap, max(0, left - gap) : left + width + gap]
        if not around.any():
            return slice(top, top + height), slice(left, left + width)
    return None


def boxes(
    rng: np.random.Generator, rows: int, cols: int, number: int, colours: list[int], side: tuple[int, int] = (1, 3),
    margin: int = 0,
) -> Cells:  # fmt: skip
    """Up to `number` full rectangles that do not touch, each in one of the colours."""
    cells = blank(rows, cols)
    for _ in range(number):
        height, width = (int(n) for n in rng.integers(side[0], side[1] + 1, 2))
        where = place(rng, cells, height, width, margin=margin)
        if where is not None:
            cells[where] = rng.choice(colours)
    return cells
