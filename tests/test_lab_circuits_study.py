"""study_circuits.py: random features as controls, and one puzzle from the trace to the table."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import study_circuits
from running import run


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.data())
def test_controls_are_others_with_as_much_influence_or_of_the_same_layers(seed: int, count: int, data: st.DataObject):
    rng = np.random.default_rng(seed)
    influence, size, layer = rng.random(count), rng.random(count), rng.integers(3, size=count)
    ranked = np.argsort(-influence)
    at = data.draw(st.integers(1, count - 1))
    top, rest = ranked[:at], ranked[at:]

    drawn = study_circuits.equal(top, rest, influence, rng)
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(rest)
    enough = influence[drawn].sum() >= influence[top].sum() * (1 - 1e-9)
    assert enough or len(drawn) == len(rest)
    assert influence[drawn[:-1]].sum() < influence[top].sum() * (1 + 1e-9), "and no more than it takes"

    drawn = study_circuits.alike(top, rest, layer, size, rng)
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(rest)
    counts = [np.bincount(layer[some], minlength=3) for some in (drawn, top, rest)]
    np.testing.assert_array_equal(counts[0], np.minimum(counts[1], counts[2]))


def test_a_puzzle_is_studied_from_the_trace_to_the_table(tmp_path: Path):
    config = study_circuits.Config(
        families=("mirror",), sides=(3, 3), puzzles=1, silenced=4, draws=2, max_features=24, out=tmp_path
    )
    said = run(study_circuits, config)
    (puzzle,) = json.loads((tmp_path / "study.json").read_text())["mirror"]
    assert puzzle["task"].startswith("mirror")
    assert len(puzzle["features"]) == 4
    assert {name: len(draws) for name, draws in puzzle["silenced"].items()} == {
        "strongest": 1,
        "equal influence": 2,
        "as strong": 2,
    }
    heads = puzzle["heads"]
    assert np.shape(heads["recovered"]) == (6, 4)
    assert heads["corrupted"] < heads["clean"] <= 0
    assert np.max(heads["recovered"]) > 0.1, "some head brings the rule back"
    assert "mirror: strongest features stand at" in said
