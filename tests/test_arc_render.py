"""Pictures hold the grids they show, in the official colours, in every form."""

import re
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest
from hypothesis import given

import arc
from arc.canvas import rgb
from arc.render import GAP, PALETTE, TEXT, Panel, ansi, canvas, prediction_row, save, task_page, value_panel
from strategies import grids, tasks

TOP = GAP + TEXT + 4
A, B = arc.as_grid([[1, 2], [3, 4]]), arc.as_grid([[1, 2], [3, 5]])


@given(grid=grids(12))
def test_pixels_show_the_colours(grid):
    image = canvas([[Panel("", grid)]], cell=8).pixels()
    centres = image[TOP + 4 : TOP + 8 * grid.shape[0] : 8, GAP + 4 : GAP + 8 * grid.shape[1] : 8]
    assert np.array_equal(centres, np.array([rgb(c) for c in PALETTE], np.uint8)[grid])


@given(grid=grids(8))
def test_svg_shows_the_colours(grid):
    root = ElementTree.fromstring(canvas([[Panel("a < b & \x01", grid)]]).svg())
    fills = [element.get("fill") for element in root if element.get("width") == "15"]
    assert fills == [PALETTE[colour] for colour in grid.ravel()]


@given(grid=grids(8))
def test_the_terminal_shows_the_colours(grid):
    found = re.findall(r"48;2;(\d+);(\d+);(\d+)m", ansi([[Panel("t", grid)]]))
    assert [tuple(map(int, colour)) for colour in found] == [rgb(PALETTE[c]) for c in grid.ravel()]


def test_png_is_what_the_pixels_are():
    drawn = canvas(task_page(arc.Task("t", (arc.Pair(A, B),), (arc.Pair(A),))))
    data = drawn.png()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4 : start], "big")
    raw = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + size]), np.uint8).reshape(drawn.height, -1)
    assert np.array_equal(raw[:, 1:].reshape(drawn.height, drawn.width, 3), drawn.pixels())
    plt = pytest.importorskip("matplotlib.image")
    import io

    assert np.array_equal((plt.imread(io.BytesIO(data)) * 255).round().astype(np.uint8)[..., :3], drawn.pixels())


def test_differing_cells_are_marked():
    row = prediction_row("test 0", A, B, A)
    assert [panel.title for panel in row] == ["test 0", "wrong", "truth"]
    assert row[1].marks.tolist() == [[False, False], [False, True]]
    assert ansi([row]).count("××") == 2
    assert prediction_row("", A, A, A)[1].title == "right"
    assert prediction_row("", A, None, A)[1].grid is None
    assert prediction_row("", A, arc.as_grid([[1]]), A)[1].marks.all()
    plain, marked = (canvas([[Panel("", A, marks)]]).pixels() for marks in (None, A != B))
    rows, cols = np.nonzero((plain != marked).any(-1))
    assert (rows.min() > TOP + 16, cols.min() > GAP + 16) == (True, True)  # only the last cell changes


def test_values_are_areas_on_one_scale_for_the_page():
    panel = value_panel("v", arc.as_grid([[0, 0, 0, 0]]), np.array([[1.0, 0.25, 0.0, np.nan]]))
    image = canvas([[panel]]).pixels()
    white = [(image[TOP + 1 : TOP + 16, GAP + 16 * i + 1 : GAP + 16 * i + 16] == 255).all(-1).sum() for i in range(4)]
    assert white == [13 * 13, 6 * 6, 0, 0]
    assert re.findall(r"m( \d| \?)", ansi([[panel]])) == [" 9", " 2", " 0", " ?"]


def test_a_page_of_many_loses_none():
    panels = [Panel(str(number), A) for number in range(8)]
    page = arc.render.page_of(panels, 3)
    assert [len(row) for row in page] == [3, 3, 2]
    assert [panel for row in page for panel in row] == panels


@given(task=tasks())
def test_any_task_can_be_saved(tmp_path_factory, task):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("a.svg", "deep/a.png"):
        save(folder / name, task_page(task))
        assert (folder / name).stat().st_size > 100


def test_bad_pictures_are_refused(tmp_path):
    with pytest.raises(arc.InputError, match=r"expected \.svg or \.png"):
        save(tmp_path / "a.gif", [[Panel("", A)]])
    with pytest.raises(arc.InputError, match="page: found an empty"):
        canvas([[]])
    with pytest.raises(arc.InputError, match=r"values: found shape \(1, 1\), expected \(2, 2\)"):
        value_panel("v", A, np.zeros((1, 1)))
