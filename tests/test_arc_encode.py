"""Every encoder is an exact inverse of itself, and its names read back."""

import numpy as np
import pytest
from hypothesis import given

import arc
from arc.encode import parse_encoder
from strategies import grids

COMPOSED = [
    *arc.ENCODERS,
    "separated(', ')", "code(separated(' '))", "code(repeated(2))", "shape(rows(repeated))", "symbols(rows(minimal))",
    "shape(rows(words))", "symbols(minimal, 'ABCDEFGHIJ')", "shape(json)", "code(rows(separated))", "padded(3)",
    "rows(padded(4))", "padded(12)", "shape(symbols(padded))",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
@given(grid=grids())
def test_decode_inverts_encode(name, grid):
    encoder = parse_encoder(name)
    text = encoder.encode(grid)
    assert np.array_equal(encoder.decode(text), grid)
    assert text.startswith(encoder.opening)


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("shape", [(1, 1), (30, 30), (1, 30), (30, 1)])
def test_extreme_grids(name, shape):
    grid = arc.as_grid((np.arange(shape[0] * shape[1]).reshape(shape) * 7) % 10)
    encoder = parse_encoder(name)
    assert np.array_equal(encoder.decode(encoder.encode(grid)), grid)


@pytest.mark.parametrize("name", COMPOSED)
def test_names_read_back(name):
    encoder = parse_encoder(name)
    assert parse_encoder(str(encoder)) == encoder
    if name in arc.ENCODERS:
        assert str(encoder) == name
        assert arc.ENCODERS[name] == encoder


GRID = arc.as_grid([[0, 1, 2], [3, 4, 9]])
TEXTS = {
    "minimal": "012\n349",
    "separated": "0|1|2\n3|4|9",
    "separated(' ')": "0 1 2\n3 4 9",
    "padded": "012_______\n349_______",
    "padded(2)": "012\n349",
    "repeated": "000111222\n333444999",
    "symbols(minimal)": "ñò÷\nûąĞ",
    "words": "Black Blue Red\nGreen Yellow Maroon",
    "json": "[[0, 1, 2], [3, 4, 9]]",
    "rows(minimal)": "1 012\n2 349",
    "code(minimal)": "```grid\n012\n349\n```",
    "shape(minimal)": "```grid shape: 2x3\n012\n349\n```",
    "shape(rows(minimal))": "```grid shape: 2x3\n1 012\n2 349\n```",
    "GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))": "```grid shape: 2x3\n1 012\n2 349\n```",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name):
    assert parse_encoder(name).encode(GRID) == TEXTS[name]


BAD_NAMES = [
    "", "nothing", "shape(", "shape(rows(minimal)", "shape(minimal))", "rows(shape(minimal))", "rows(json)",
    "shape(shape(minimal))", "__import__('os')", "minimal(3)", "repeated('2')", "repeated(0)", "separated(1)",
    "separated('1')", "symbols(minimal, 'abc')", "symbols(words, 'BlacGrenYw')", "minimal minimal", "3", "'x'",
    "padded(0)", "padded(31)",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_in_one_line(name):
    with pytest.raises(arc.InputError) as error:
        parse_encoder(name)
    assert "\n" not in str(error.value)


def test_a_name_without_arguments_takes_the_defaults():
    assert str(parse_encoder("shape")) == "shape(minimal)"


BAD_TEXTS = [
    ("minimal", ""), ("minimal", "01\n2"), ("minimal", "0a"), ("minimal", "٣"), ("minimal", "01\n"),
    ("separated", "0||1"), ("padded", "01_2"), ("repeated", "0001112"), ("repeated", "001"), ("words", "Black black"),
    ("rows(minimal)", "1 01\n3 01"), ("rows(minimal)", "01\n01"), ("json", "[[0, 1], [2]]"), ("json", "[" * 10**5),
    ("json", "[[true]]"), ("code(minimal)", "```grid\n01"), ("code(minimal)", "01"), ("code(minimal)", "```grid\n```"),
    ("shape(minimal)", "```grid shape: 2x2\n01\n```"), ("shape(minimal)", "```grid\n01\n```"),
    ("shape(rows(minimal))", "```grid shape: 1x31\n1 " + "0" * 31 + "\n```"), ("symbols(minimal)", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), BAD_TEXTS)
def test_bad_texts_are_refused_in_one_line(name, text):
    with pytest.raises(arc.InputError) as error:
        arc.ENCODERS[name].decode(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
