"""What models say, well and badly, becomes a grid or a reason, and never an exception."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
from arc.parse import parse
from strategies import grids

NAMES = [
    *arc.ENCODERS,
    "shape(rows(words))",
    "code(separated(' '))",
    "separated(', ')",
    "rows(symbols(minimal))",
    "padded(4)",
]
GRID = [[0, 1, 2], [3, 4, 5]]
BEGUN = arc.prefill()  # "### Output\n\n```grid"


@pytest.mark.parametrize("name", NAMES)
@given(grid=grids(), begin=st.booleans())
def test_an_encoded_answer_is_read(name, grid, begin):
    text = arc.prompt.answer(grid, name)
    begun = arc.prefill(name) if begin else ""
    found = parse(text.removeprefix(begun), name, begun)
    assert np.array_equal(found.grid, grid)
    assert (found.reason, found.notes) == (None, ())
    assert parse(text, name).notes == ()


# text -> (grid or reason, a note or a piece of the detail)
FORGIVEN = {
    "bare continuation": (" shape: 2x3\n1 012\n2 345\n```", None),
    "end token": (" shape: 2x3\n1 012\n2 345\n```<|im_end|>\n<|im_start|>user", None),
    "windows line ends": (" shape: 2x3\r\n1 012\r\n2 345\r\n```", None),
    "trailing spaces": (" shape: 2x3  \n1 012 \n2 345\t\n```", None),
    "no closing fence, complete": (" shape: 2x3\n1 012\n2 345", "block not closed"),
    "fence on the last row": (" shape: 2x3\n1 012\n2 345```", None),
    "run-on columns": (" shape: 2x3\n1 0121\n2 345345\n```", "rows trimmed to the shape"),
    "run-on rows": (" shape: 2x3\n1 012\n2 345\n3 678\n4 678\n```", "2 lines beyond the shape"),
    "run-on nonsense": (" shape: 2x3\n1 012\n2 345\nso that is it\n```", "1 lines beyond the shape"),
    "run-on, cut off": (" shape: 2x3\n1 012\n2 345\n3 67", "block not closed"),
    "a second grid": (" shape: 2x3\n1 012\n2 345\n```\n\n## Example\n```grid shape: 1x1\n1 7\n```",
                      "a further block follows"),
    "a broken first grid": (" shape: 2x3\n1 01\n2 345\n```\nSorry:\n```grid shape: 2x3\n1 012\n2 345\n```",
                            "taken from block 2"),
    "the fence again": ("```grid shape: 2x3\n1 012\n2 345\n```", None),
    "prose around": ("```\nLet me see.\n\n```grid shape: 2x3\n1 012\n2 345\n```\nDone.", None),
    "no shape": ("\n1 012\n2 345\n```", None),
    "blank lines": (" shape: 2x3\n\n1 012\n2 345\n\n```", None),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGIVEN)
def test_what_is_forgiven(case):
    text, note = FORGIVEN[case]
    found = parse(text, begun=BEGUN)
    assert found.grid is not None, found
    assert found.grid.tolist() == GRID
    assert note is None or note in found.notes


FAILURES = {
    "silence": ("", "nothing", "empty"),
    "only the end": ("<|im_end|>", "nothing", "empty"),
    "prose": ("I cannot solve this.", "cut off", "no rows"),
    "row number skipped": (" shape: 2x3\n1 012\n3 345\n```", "bad row", "found row number '3', expected 2"),
    "row numbers from 0": (" shape: 2x3\n0 012\n1 345\n```", "bad row", "found row number '0', expected 1"),
    "letters": (" shape: 2x3\n1 0a2\n2 345\n```", "bad row", "found 'a'"),
    "a row short": (" shape: 2x3\n1 012\n2 34\n```", "wrong shape", "row 1 has 2 cells, the shape says 3"),
    "a row missing": (" shape: 2x3\n1 012\n```", "wrong shape", "1 rows, the shape says 2"),
    "cut off between rows": (" shape: 2x3\n1 012\n", "cut off", "1 rows, the shape says 2"),
    "cut off in a row": (" shape: 2x3\n1 012\n2 3", "cut off", "row 1 has 1 cells"),
    "cut off in a number": (" shape: 12x1\n" + "".join(f"{i} 0\n" for i in range(1, 10)) + "1", "cut off", "row 9"),
    "31 declared": (" shape: 31x1\n" + "".join(f"{i} 0\n" for i in range(1, 32)) + "```", "too large", "31 x 1"),
    "0 declared": (" shape: 0x3\n```", "too large", "0 x 3"),
    "31 wide": ("\n1 " + "0" * 31 + "\n```", "too large", "31"),
    "31 high": ("\n" + "".join(f"{i} 0\n" for i in range(1, 32)) + "```", "too large", "31"),
    "ragged without shape": ("\n1 012\n2 34\n3 567\n```", "ragged", "2 to 3"),
    "cut off without shape": ("\n1 012\n2 34", "cut off", "2 to 3"),
    "nothing in the block": ("\n```", "no grid", "no rows"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_have_reasons(case):
    text, reason, piece = FAILURES[case]
    found = parse(text, begun=BEGUN)
    assert (found.grid, found.reason) == (None, reason), found
    assert piece in found.detail


OTHERS = {
    "minimal, prose around": ("minimal", "The answer is\n012\n345\n\nas you see", GRID),
    "minimal, two grids": ("minimal", "012\n345\n\n999", GRID),
    "minimal, ragged then good": ("minimal", "01\n2\n\n012\n345", GRID),
    "compact, runs on": ("minimal", "012\n345\n\nI\n111\nO\n222", GRID),
    "rows restart": ("rows(minimal)", "1 012\n2 345\n1 999", GRID),
    "code without fence": ("code(minimal)", "012\n345", GRID),
    "another language's fence": ("code(minimal)", "```python\n012\n345\n```", GRID),
    "the grid fence before others": ("code(minimal)", "```python\nx = 1\n```\n```grid\n012\n345\n```", GRID),
    "words": ("words", "Sure!\nBlack Blue Red\nGreen Yellow Grey", GRID),
    "json in prose": ("json", "So: [[0, 1, 2],\n [3,4,5]] is it. [[1]]", GRID),
    "json in a block": ("code(json)", "```grid\n[[0,1,2],[3,4,5]]\n```", GRID),
    "json without its block": ("code(json)", "[[0,1,2],[3,4,5]]", GRID),
    "json trimmed": ("shape(json)", "```grid shape: 2x3\n[[0,1,2,2],[3,4,5]]\n```", "bad row"),
    "json cut off": ("code(json)", "```grid\n[[0,1,2],[3,4", "cut off"),
    "json of tens": ("json", "[[10]]", "bad row"),
    "symbols": ("shape(rows(symbols(minimal)))", "```grid shape: 2x3\nò ñò÷\n÷ ûąć\n```", "bad row"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_encoders(case):
    name, text, expected = OTHERS[case]
    found = parse(text, name)
    assert (found.reason if found.grid is None else found.grid.tolist()) == expected, found


PIECES = ["```", "grid", " shape: ", "2x2", "99x1", "\n", "1 ", "2 ", "00", "0", "Black", " ", "|", "[[0]]", "[", "]",
          "x", "ñ", "<|im_end|>", "\r", "\x00", "٣", "²", "`", "{", "NaN", "1e999", "1" * 50]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)), begin=st.booleans())
def test_no_text_raises(name, text, begin):
    found = parse(text, name, arc.prefill(name) if begin else "")
    assert (found.grid is None) == (found.reason is not None)
    if found.grid is not None:
        assert found.grid.dtype == np.uint8
        assert arc.as_grid(found.grid).shape == found.grid.shape


LONG = ["[" * 10**6, "```" * 10**5, "0" * 10**6, "1 0\n2 00\n3 0\n\n" * 10**4, "[[" + "0," * 10**5, "\n" * 10**6]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
@pytest.mark.parametrize("name", ["shape(rows(minimal))", "minimal", "json", "code(json)"])
def test_long_nonsense_is_read_in_one_pass(name, text):
    assert parse(text, name).grid is None


@given(grid=grids(max_side=8), cut=st.integers(0, 400))
def test_a_cut_answer_is_the_grid_or_nothing(grid, cut):
    whole = arc.prompt.answer(grid).removeprefix(BEGUN)
    found = parse(whole[:cut], begun=BEGUN)
    assert found.grid is None or np.array_equal(found.grid, grid)


def test_an_encoder_of_ones_own():
    class Mine(arc.Encoder):
        def encode(self, grid):
            return "/".join("".join(map(str, row)) for row in grid.tolist())

        def rows(self, text):
            if not text.replace("/", "").isdecimal():
                raise arc.InputError("text: expected digits and slashes")
            return [[int(cell) for cell in row] for row in text.split("/")]

    assert parse(" 012/345\n", Mine()).grid.tolist() == GRID
    assert parse("hello", Mine()).reason == "no grid"
