"""Every family does by hand-made examples what its sentence says, and its tasks can be solved."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
from arc.family import Family
from arc.generators import COMPOSITIONS, FAMILIES, make_task, named, stream


def cells(text):
    return np.array([[int(c) for c in row] for row in text.split("/")], np.uint8)


# family, variant, input, output
BY_HAND = [
    ("mirror", 0, "12/34", "34/12"),
    ("mirror", 1, "12/34", "21/43"),
    ("rotate", 1, "12/34", "24/13"),
    ("transpose", "main", "12/34", "13/24"),
    ("transpose", "other", "12/34", "42/31"),
    ("translate", (1, 0), "12/34/56", "56/12/34"),
    ("translate", (0, -1), "123", "231"),
    ("scale", 2, "12", "1122/1122"),
    ("tile", (1, 2), "12/34", "1212/3434"),
    ("kaleidoscope", "both", "12/34", "1221/3443/3443/1221"),
    ("kaleidoscope", "down", "12/34", "12/34/34/12"),
    ("kaleidoscope", "right", "12/34", "1221/3443"),
    ("keep_half", "left", "12/34", "1/3"),
    ("keep_half", "down", "12/34", "34"),
    ("repeat_pattern", None, "1212/2001/1002/2121", "1212/2121/1212/2121"),
    ("complete_symmetry", "left and right", "1021/3443", "1221/3443"),
    ("complete_symmetry", "up and down", "12/34/34/02", "12/34/34/12"),
    ("gravity", "down", "12/00/30", "00/10/32"),
    ("gravity", "left", "010/203", "100/230"),
    ("gravity", "up", "00/12", "12/00"),
    ("gravity", "right", "120", "012"),
    ("extend_line", "right", "0100/2030", "0111/2233"),
    ("extend_line", "up", "00/10", "10/10"),
    ("panel_and", 7, "11520/10522", "70/70"),
    ("panel_or", 7, "10502/00500", "77/00"),
    ("panel_xor", 7, "11502/00500", "70/00"),
    ("frame", 4, "1111/1231/1111", "4444/4234/4444"),
    ("sort", "rising", "030/130/132", "003/013/213"),
    ("sort", "falling", "030/130/132", "300/310/312"),
    ("recolour", (1, 5), "121", "525"),
    ("recolour", (1, 0), "121", "020"),
    ("swap_colours", (1, 2), "1203", "2103"),
    ("crop_to_object", None, "0000/0120/0020/0000", "12/02"),
    ("count", "row", "4404/4400/0004", "444"),
    ("count", "column", "404", "4/4"),
    ("join_pairs", None, "10010/00000/02200", "11110/00000/02200"),
    ("join_pairs", None, "3/0/0/3", "3/3/3/3"),
    ("draw_lines", "cross", "000/060/000", "060/666/060"),
    ("draw_lines", "row", "000/060", "000/666"),
    ("draw_lines", "column", "000/060", "060/060"),
    ("fill_enclosed", 4, "1110/1010/1110", "1110/1410/1110"),
    ("fill_enclosed", 4, "101/101/111", "101/101/111"),
    ("outline", 8, "0000/0200/0000", "8880/8280/8880"),
    ("largest_object", "largest", "1101/0000/2220", "0000/0000/2220"),
    ("largest_object", "smallest", "1101/0000/2220", "0001/0000/0000"),
    ("mark_largest", 9, "1101/0000/2220", "1101/0000/9990"),
    ("crop_largest", "largest", "1101/0000/2220", "222"),
    ("denoise", None, "110/110/000/003", "110/110/000/000"),
    ("commonest_colour", "most", "1022/0200", "2"),
    ("commonest_colour", "least", "1022/0200", "1"),
    ("draw_diagonals", "falling", "000/060/000", "600/060/006"),
    ("draw_diagonals", "rising", "000/060/000", "006/060/600"),
    ("draw_diagonals", "both", "0100/0000", "0100/1010"),
    ("majority", "row", "112/333", "111/333"),
    ("majority", "column", "12/13/23", "13/13/13"),
    ("mark_neighbours", (2, 7), "110/010", "170/010"),
    ("mark_neighbours", (0, 7), "101/001", "701/001"),
    ("every_second", (("row", 1), 4), "12/30/12", "12/40/12"),
    ("every_second", (("column", 0), 4), "120/102", "420/404"),
    ("every_second", (("both", 0), 4), "111/110", "414/140"),
    ("take_colour", "left", "205/330", "202/330"),
    ("take_colour", "right", "205/033", "505/033"),
    ("take_colour", "up", "23/05/50", "23/03/20"),
    ("take_colour", "down", "05/50/23", "03/20/23"),
    ("stamp", ("plus", 3), "000/010/000", "030/313/030"),
    ("stamp", ("corners", 3), "0000/0100/0000", "3030/0100/3030"),
    ("stamp", ("left and right", 3), "0010/1000", "0313/1300"),
    ("stamp", ("up and down", 3), "0/1/0", "3/1/3"),
    ("hollow", 0, "222/222/222", "222/202/222"),
    ("hollow", 4, "2222/2222/2222/2200", "2222/2442/2222/2200"),
    ("span_rectangle", "full", "1000/0010/0000", "1110/1110/0000"),
    ("span_rectangle", "edge", "0010/0000/1000", "1110/1010/1110"),
    ("empty_lines", ("row", 5), "10/00", "10/55"),
    ("empty_lines", ("column", 5), "10/00", "15/05"),
    ("empty_lines", ("both", 5), "10/00", "15/55"),
    ("mark_edge", ("touching", 8), "1000/0000/0010/0000", "8000/0000/0010/0000"),
    ("mark_edge", ("inside", 8), "1000/0000/0010/0000", "1000/0000/0080/0000"),
]


@pytest.mark.parametrize(("name", "variant", "given_", "expected"), BY_HAND)
def test_rules_by_hand(name, variant, given_, expected):
    before = cells(given_)
    found = FAMILIES[name].solve(before, variant)
    assert found.tolist() == cells(expected).tolist()
    assert before.tolist() == cells(given_).tolist()
    assert variant in FAMILIES[name].variants


def test_forty_families_each_with_one_sentence():
    assert len(FAMILIES) == 40
    assert {name for name, *_ in BY_HAND} == set(FAMILIES)
    assert all(f.rule.count(".") == 1 and f.rule.endswith(".") and f.rule[0].isupper() for f in FAMILIES.values())
    assert len({family.rule for family in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
@given(seed=st.integers(0, 2**40), test=st.integers(1, 2))
def test_every_task_can_be_solved_from_its_training_pairs(name, seed, test):
    family, task = FAMILIES[name], make_task(name, seed, test=test)
    assert (len(task.train), len(task.test)) == (3, test)
    answers = set()
    for variant in family.variants:
        if all(np.array_equal(family.solve(p.input, variant), p.output) for p in task.train):
            answers.add(tuple(arc.as_grid(family.solve(p.input, variant)).tobytes() for p in task.test))
    assert answers == {tuple(pair.output.tobytes() for pair in task.test)}
    for pair in (*task.train, *task.test):
        assert max(*pair.input.shape, *pair.output.shape) <= 10
        assert not np.array_equal(pair.input, pair.output)
    inputs = [(pair.input.shape, pair.input.tobytes()) for pair in (*task.train, *task.test)]
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_seeds_make_tasks(name):
    some = [make_task(name, seed) for seed in range(8)]
    assert some == [make_task(FAMILIES[name], seed) for seed in range(8)]
    assert len({(task.train, task.test) for task in some}) == 8
    assert some[3].id == f"{name}-3"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sides", [(3, 4), (4, 5), (1, 6), (12, 12), (20, 30)])
def test_sizes_stay_within_bounds(name, sides):
    for seed in range(2):
        task = make_task(name, seed, sides=sides)
        assert all(max(*p.input.shape, *p.output.shape) <= sides[1] for p in (*task.train, *task.test))


@pytest.mark.parametrize("name", ["mirror", "panel_and", "repeat_pattern", "fill_enclosed", "largest_object"])
def test_too_little_room_is_said(name):
    with pytest.raises(arc.InputError, match=rf"^family {name}: found no task within sides \(1, 1\)"):
        make_task(name, 0, sides=(1, 1))


@pytest.mark.parametrize("name", COMPOSITIONS)
@given(seed=st.integers(0, 2**40))
def test_a_composition_is_one_rule_after_the_other(name, seed):
    first, second = (FAMILIES[part] for part in name.split("+"))
    task, both = make_task(name, seed, sides=(3, 6)), named(name)
    explained = [
        (v, w) for v in first.variants for w in second.variants
        if all(np.array_equal(second.solve(first.solve(p.input, v), w), p.output) for p in task.train)
    ]  # fmt: skip
    assert explained
    assert explained == both.consistent(task.train)
    assert all(np.array_equal(both.solve(p.input, v), p.output) for v in explained for p in task.test)


def test_bad_arguments():
    for unknown in ("nothing", "mirror+nothing", "mirror+mirror+mirror", "+", "mirror+"):
        with pytest.raises(
            arc.InputError, match=re.escape(f"family: found {unknown!r}, expected one of mirror, rotate")
        ):
            make_task(unknown, 0)
    for bad in ({"sides": (0, 3)}, {"sides": (3, 31)}, {"sides": (4, 3)}, {"train": 0}, {"test": 0}):
        with pytest.raises(arc.InputError, match="expected sides 1 to 30, pairs 1 up"):
            make_task("mirror", 0, **bad)


def test_the_stream_takes_families_in_turn():
    tasks = stream(5, ["mirror", "gravity"], sides=(3, 4))
    assert [next(tasks).id for _ in range(4)] == ["mirror-5", "gravity-5", "mirror-6", "gravity-6"]


def test_a_family_that_training_pairs_cannot_decide_is_never_made():
    same_on_training = Family(
        "trap", "Nothing can be known.", lambda rng, rows, cols, v: rng.integers(0, 9, (rows, cols)).astype(np.uint8),
        lambda g, v: (g + 1 + v * (g[0, 0] == 0)).astype(np.uint8) % 10, (0, 1),
    )  # fmt: skip
    for seed in range(20):
        task = same_on_training.task(seed, train=1)
        left = same_on_training.consistent(task.train)
        assert len({tuple(same_on_training.solve(p.input, v).tobytes() for p in task.test) for v in left}) == 1
