"""Rows of ids: the ladder of widths, and padding on either side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_eqx import InputError
from qwen_eqx.text.ids import bucket, pad_left, pad_right


@given(length=st.integers(0, 100_000))
def test_buckets_hold_and_waste_at_most_a_third(length: int):
    size = bucket(length)
    assert size >= length
    assert bucket(size) == size
    assert size == 16 or length > size * 2 / 3 - 1


def test_the_ladder():
    assert [bucket(n) for n in (1, 17, 200, 257, 385, 513, 769, 1025, 1537)] == [
        16, 24, 256, 384, 512, 768, 1024, 1536, 2048
    ]  # fmt: skip


@given(rows=st.lists(st.lists(st.integers(0, 511), max_size=9), min_size=1, max_size=5), pad=st.integers(0, 511))
def test_left_padding_keeps_every_row_at_the_right(rows: list[list[int]], pad: int):
    padded = pad_left(rows, 9, pad)
    assert padded.shape == (len(rows), 9)
    assert padded.dtype == np.int32
    for row, found in zip(rows, padded.tolist(), strict=True):
        assert found == [pad] * (9 - len(row)) + row


@given(rows=st.lists(st.lists(st.integers(0, 511), max_size=9), min_size=1, max_size=5), pad=st.integers(0, 511))
def test_right_padding_is_left_padding_seen_in_a_mirror(rows: list[list[int]], pad: int):
    mirrored = pad_left([row[::-1] for row in rows], 9, pad)[:, ::-1]
    np.testing.assert_array_equal(pad_right(rows, 9, pad), mirrored)


@pytest.mark.parametrize("padded", [pad_left, pad_right])
def test_a_row_longer_than_the_padding(padded):
    with pytest.raises(InputError, match=r"rows\[1\]: found 3 tokens, expected at most length=2"):
        padded([[1], [1, 2, 3]], 2, 0)
