"""What was found of a model's parts, drawn: heat maps over tokens and heads, and over the cells of grids."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

import arc
import qwen_eqx
from arc.spans import Cell
from qwen_lab import figures
from qwen_lab.corpus import cells_of_tokens
from qwen_lab.errors import InputError


def heat(
    path: Path, found: qwen_eqx.Labelled, named: Mapping[str, Sequence[str]] | None = None, title: str = ""
) -> str:
    """Two axes as rows and columns, red above zero and blue below; `named` gives an axis other names for its labels.

    `named={"position": pieces}` writes tokens under the columns.
    """
    if found.values.ndim != 2:
        raise InputError(f"heat: found axes {', '.join(found.labels) or 'none'}, expected two; choose with .at or .sum")
    names = {axis: [str(label) for label in labels] for axis, labels in found.labels.items()}
    for axis, given in (named or {}).items():
        if axis not in names or len(given) != len(names[axis]):
            expected = ", ".join(f"{len(each)} of {axis}" for axis, each in names.items())
            raise InputError(f"heat: found {len(given)} names of {axis}, expected {expected}")
        names[axis] = [_shown(name) for name in given]
    return figures.heat(path, found.values, names, title)


def over_grids(
    values: Float[np.ndarray, " seq"], cells: Sequence[Cell], offsets: Sequence[tuple[int, int]]
) -> list[list[arc.render.Panel]]:
    """A page for `arc.render.save`: each grid of a prompt with the sum of the values of the tokens that stand in a cell.

    `cells` are `arc.prompt.build(…).cells`, `offsets` those of `tokenizer.encode_with_offsets(text)`.
    """
    if len(values) != len(offsets):
        raise InputError(f"values: found {len(values)}, expected one for each of {len(offsets)} tokens")
    of_cell: dict[Cell, float] = dict.fromkeys(cells, 0.0)
    for owner, value in zip(cells_of_tokens(cells, offsets), values, strict=True):
        if owner is not None:
            of_cell[owner] += float(value)
    page = []
    for pair, grids in itertools.groupby(cells, key=lambda cell: cell.pair):
        parts = [(part, list(each)) for part, each in itertools.groupby(grids, key=lambda cell: cell.part)]
        page.append([_panel(f"{pair} {part}", each, of_cell) for part, each in parts])
    return page


def _panel(title: str, cells: list[Cell], of_cell: Mapping[Cell, float]) -> arc.render.Panel:
    rows = [list(row) for _, row in itertools.groupby(cells, key=lambda cell: cell.row)]
    grid = arc.as_grid([[cell.colour for cell in row] for row in rows])
    return arc.render.value_panel(title, grid, np.asarray([[of_cell[cell] for cell in row] for row in rows]))


def _shown(token: Any) -> str:
    """A token's text in one line; `$` would start a formula."""
    return str(token).replace("\n", "↵").replace(" ", "·").replace("$", r"\$")
