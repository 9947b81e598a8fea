"""Pictures of what was found: every cell of a grid has the sum of its tokens, and a heat map its names."""

from pathlib import Path

import numpy as np
import pytest

import arc
import qwen_eqx
from qwen_lab import heat
from qwen_lab.errors import InputError

FOUND = qwen_eqx.Labelled(np.asarray([[1.0, -2.0, 0.0], [0.5, 0.0, 4.0]]), {"layer": (0, 3), "position": (0, 1, 2)})


def test_a_heat_map_has_a_name_for_every_row_and_column(tmp_path: Path):
    pytest.importorskip("matplotlib")
    said = heat.heat(tmp_path / "heat.svg", FOUND, {"position": ["1", "\n", "$"]}, "streams")
    drawn = Path(said).read_text()
    assert all(name in drawn for name in ("↵", "streams: 4 is full colour", "position", "layer"))


@pytest.mark.parametrize(
    ("found", "named", "part"),
    [
        (FOUND.at(layer=0), {}, "found axes position, expected two"),
        (FOUND, {"position": ["a"]}, "found 1 names of position, expected 2 of layer, 3 of position"),
        (FOUND, {"head": ["a"]}, "names of head"),
    ],
)
def test_a_heat_map_that_cannot_be_drawn_is_refused(tmp_path: Path, found: qwen_eqx.Labelled, named: dict, part: str):
    with pytest.raises(InputError, match=part):
        heat.heat(tmp_path / "heat.svg", found, named)


def test_each_cell_has_the_sum_of_its_tokens():
    tokenizer = qwen_eqx.from_pretrained("tiny-random")[1]
    pair = arc.Pair(arc.as_grid([[1, 2], [3, 4]]), arc.as_grid([[5]]))
    prompt = arc.prompt.build(arc.Task("t", (pair,), (arc.Pair(arc.as_grid([[7, 8, 9]]), None),)), 0)
    _, offsets = tokenizer.encode_with_offsets(prompt.text)
    values = np.arange(1.0, len(offsets) + 1)
    page = heat.over_grids(values, prompt.cells, offsets)
    assert [[panel.title for panel in row] for row in page] == [["0 input", "0 output"], ["1 input"]]
    for row, grids in zip(page, ((pair.input, pair.output), ([[7, 8, 9]],)), strict=True):
        for panel, grid in zip(row, grids, strict=True):
            np.testing.assert_array_equal(panel.grid, grid)
            for (r, c), value in np.ndenumerate(panel.values):
                [cell] = [
                    each for each in prompt.cells if f"{each.pair} {each.part}" == panel.title and each[2:4] == (r, c)
                ]
                inside = [start < cell.end and cell.start < end for start, end in offsets]
                assert value == values[inside].sum()
    with pytest.raises(InputError, match="one for each of"):
        heat.over_grids(values[:-1], prompt.cells, offsets)
