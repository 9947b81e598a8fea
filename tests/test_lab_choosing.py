"""Which positions become rows: a law of the item alone, and never more than was said before."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_lab import InputError
from qwen_lab.choosing import Choice, Read, marked, rows_of
from qwen_lab.marks import Marks
from sae import Rows


@st.composite
def reads(draw) -> Read:
    count = draw(st.integers(1, 12))
    tokens = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    prompt = draw(st.none() | st.integers(1, count))
    pairs = draw(st.integers(1, 2))
    part = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    cells = [(draw(st.integers(0, 3)), each, 0, 0, 0) if each else (-1, 0, -1, -1, -1) for each in part]
    return Read(draw(st.integers(0, 50)), tokens, prompt, Marks(*np.asarray(cells, np.int8).T), pairs)


@st.composite
def choices(draw) -> Choice:
    return Choice(
        draw(st.sampled_from(["all", "generated", "prompt", "test-input", "cells"])),
        tuple(draw(st.sets(st.integers(0, 4), max_size=2))),
        draw(st.sampled_from([0.0, 2.0])),
        draw(st.sampled_from([1.0, 0.5, 0.01])),
        draw(st.integers(0, 3)),
    )


def norms_of(read: Read) -> np.ndarray:
    norms = np.random.default_rng(read.number).lognormal(sigma=2, size=(2, len(read.tokens)))
    return norms.astype(np.float32)


@given(reads(), choices())
def test_what_is_kept_obeys_every_rule(read: Read, choice: Choice):
    norms = norms_of(read)
    kept = choice.keep(read, norms)
    assert kept.tolist() == sorted(set(kept.tolist()))
    whole = dataclasses.replace(choice, sample_rows=1.0).keep(read, norms)
    assert set(kept) <= set(whole)
    assert len(kept) == int(np.ceil(choice.sample_rows * len(whole)))
    assert read.marks is not None
    for place in whole:
        assert read.tokens[place] not in choice.exclude_tokens
        if choice.sink_times:
            assert all(row[place] <= choice.sink_times * np.median(row) for row in norms)
        assert {
            "all": True,
            "generated": read.prompt is not None and place >= read.prompt - 1,
            "prompt": read.prompt is None or place < read.prompt,
            "cells": read.marks.part[place] > 0,
            "test-input": read.marks.part[place] == 1 and read.marks.pair[place] >= read.pairs,
        }[choice.positions]
    if choice.keeps_all_kinds:
        assert len(kept) == choice.rows_at_most(len(read.tokens))


@given(reads(), choices())
def test_another_seed_draws_another_sample_of_the_same(read: Read, choice: Choice):
    norms = norms_of(read)
    again = choice.keep(dataclasses.replace(read), norms.copy())
    assert np.array_equal(choice.keep(read, norms), again)
    other = dataclasses.replace(choice, seed=choice.seed + 1).keep(read, norms)
    assert len(other) == len(again)


@given(reads(), choices())
def test_rows_say_what_they_are(read: Read, choice: Choice):
    choice = dataclasses.replace(choice, sink_times=0.0)
    values = [np.arange(3 * len(read.tokens), dtype=np.float32).reshape(-1, 3) + 100 * site for site in range(2)]
    rows = rows_of(read, choice.keep(read), values, Marks._fields)
    places = np.asarray(rows.positions)
    np.testing.assert_array_equal(rows.token_ids, np.asarray(read.tokens)[places])
    np.testing.assert_array_equal(rows.activations, np.stack(values, axis=1)[places])
    assert read.marks is not None
    np.testing.assert_array_equal(rows.part, read.marks.part[places])
    bare = rows_of(read, np.arange(len(read.tokens)), values, ())
    assert bare.part is None
    for name, column in marked(Rows(*bare[:5]), read, choice).columns.items():
        np.testing.assert_array_equal(column, rows.columns[name])


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_is_one(fraction: float):
    with pytest.raises(InputError, match="--sample-rows"):
        Choice(sample_rows=fraction)


def test_texts_have_no_cells():
    with pytest.raises(InputError, match="--positions cells"):
        Choice("cells").keep(Read(0, [1, 2], None))
