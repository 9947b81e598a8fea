"""The cell of a puzzle that each token of a document stands in, as the columns of a store's rows."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8

import arc
import qwen_eqx
from arc.ask import Request
from arc.spans import Cell, cells_of
from qwen_lab.corpus import PARTS, cells_of_tokens


class Marks(NamedTuple):
    """Of each token; a store's columns of these names."""

    pair: Int8[np.ndarray, " seq"]  # number of the training pair; of a test input, how many those are and its own
    part: Int8[np.ndarray, " seq"]  # 0 none, 1 input, 2 output
    row: Int8[np.ndarray, " seq"]  # −1 where there is no cell, as in the others
    col: Int8[np.ndarray, " seq"]
    colour: Int8[np.ndarray, " seq"]

    @classmethod
    def of(cls, owners: Sequence[Cell | None]) -> "Marks":
        """Of the cell that each token stands in."""
        none = (-1, 0, -1, -1, -1)
        values = [
            none if cell is None else (cell.pair, 1 + PARTS.index(cell.part), cell.row, cell.col, cell.colour)
            for cell in owners
        ]
        return cls(*np.asarray(values, np.int8).reshape(len(values), len(none)).T.copy())

    def then(self, more: "Marks") -> "Marks":
        """Of two texts, one after the other."""
        return Marks(*(np.concatenate(pair) for pair in zip(self, more, strict=True)))

    def first(self, tokens: int) -> "Marks":
        return Marks(*(column[:tokens] for column in self))


def of_prompt(request: Request, tokenizer: qwen_eqx.Tokenizer) -> Marks:
    """Of a prompt's tokens; no cell anywhere where a template does not leave the grids as they were written."""
    ids, offsets = tokenizer.encode_with_offsets(request.prompt.text)
    if request.prompt.grids is None:
        return Marks.of([None] * len(ids))
    return Marks.of(cells_of_tokens(request.prompt.cells, offsets))


def of_answer(
    request: Request, grid: arc.Grid | None, tokens: Sequence[int], tokenizer: qwen_eqx.Tokenizer, pairs: int
) -> Marks:
    """Of the tokens of an answer that begins with `grid` just as the encoder writes it; else no cell anywhere."""
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in tokens]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    opening = len(request.encoder.opening) if request.prompt.begun else 0
    if grid is None or "".join(pieces) != text or not text.startswith(request.encoder.encode(grid)[opening:]):
        return Marks.of([None] * len(tokens))
    ends = np.cumsum([0, *map(len, pieces)]).tolist()
    cells = cells_of(request.encoder, grid, pairs + request.test, "output", -opening)
    return Marks.of(cells_of_tokens(cells, list(itertools.pairwise(ends))))
