"""Submissions are valid by construction, read back as written, and broken ones named."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
from arc import submission
from strategies import grids, tasks

ranked = st.lists(st.one_of(st.none(), grids(5)), max_size=4)
predictions = st.dictionaries(
    st.text("0123456789abcdef", min_size=1, max_size=8), st.lists(ranked, min_size=1, max_size=3)
)


def first_two(answers):
    found = [grid.tolist() for grid in answers if grid is not None][:2]
    return [found[0], found[-1]] if found else [[[0]], [[0]]]


@given(found=predictions)
def test_write_and_read_are_inverse(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("s") / "deep" / "submission.json"
    made = submission.write(path, found)
    again = submission.read(path)
    assert submission.to_json(again) == submission.to_json(made) == json.loads(path.read_text())
    for key, tests in found.items():
        assert [[grid.tolist() for grid in pair] for pair in again[key]] == [first_two(answers) for answers in tests]


@given(task=tasks())
def test_tasks_nobody_answered_are_filled(tmp_path_factory, task):
    path = tmp_path_factory.mktemp("s") / "submission.json"
    submission.write(path, {}, [task])
    found = json.loads(path.read_text())
    assert found == {task.id: [{"attempt_1": [[0]], "attempt_2": [[0]]}] * len(task.test)}
    assert set(submission.read(path, [task])) == {task.id}


ONE = arc.as_grid([[1]])
TASK = arc.Task("a", (arc.Pair(ONE, ONE),), (arc.Pair(ONE, ONE),))
TWO = {"attempt_1": [[1]], "attempt_2": [[1]]}

BAD = {
    "list": ([], ": found a JSON list, expected an object of task ids"),
    "missing task": ({}, ", task a: found nothing, expected an entry for every task"),
    "entry no list": ({"a": TWO}, ", task a: found dict, expected a list with one entry per test input"),
    "no entry": ({"a": []}, ", task a: found list, expected a list with one entry per test input"),
    "too many tests": ({"a": [TWO, TWO]}, ", task a: found 2 test inputs, expected 1"),
    "one attempt": ({"a": [{"attempt_1": [[1]]}]},
                    ", task a, test 0: found keys ['attempt_1'], expected attempt_1 and attempt_2"),
    "attempts no object": ({"a": [[[1]]]}, ", task a, test 0: found a JSON list, expected attempt_1 and attempt_2"),
    "strange attempt": ({"a": [{**TWO, "attempt": [[1]]}]},
                        ", task a, test 0: found keys ['attempt', 'attempt_1', 'attempt_2'], expected attempt_1 and "
                        "attempt_2"),
    "empty grid": ({"a": [{**TWO, "attempt_2": []}]},
                   ", task a, test 0, attempt_2: found 0 x 0 cells, expected 1 to 30 rows and columns"),
    "colour": ({"a": [{**TWO, "attempt_1": [[1, 11]]}]},
               ", task a, test 0, attempt_1, cell row 0 column 1: found 11, expected an integer 0 to 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_broken_submissions_are_named(tmp_path, case):
    value, line = BAD[case]
    path = tmp_path / "submission.json"
    path.write_text(json.dumps(value))
    with pytest.raises(arc.InputError) as error:
        submission.read(path, [TASK])
    assert str(error.value) == f"{path}{line}"


@pytest.mark.parametrize(("found", "line"), [
    ({"b": [[ONE]]}, "predictions, task b: found a task that was not asked, expected one of the tasks"),
    ({"a": [[ONE], [ONE]]}, "predictions, task a: found 2 test inputs, expected 1"),
    ({"a": [[np.array([[10]])]]},
     "predictions, task a, test 0, cell row 0 column 0: found 10, expected an integer 0 to 9"),
])  # fmt: skip
def test_invalid_predictions_are_never_written(tmp_path, found, line):
    with pytest.raises(arc.InputError) as error:
        submission.write(tmp_path / "s.json", found, [TASK])
    assert str(error.value) == line
    assert not (tmp_path / "s.json").exists()


def test_predictions_without_tests_are_refused():
    with pytest.raises(arc.InputError, match="task a: found no test inputs"):
        submission.from_predictions({"a": []})


def test_a_write_that_fails_leaves_what_stood_there(tmp_path):
    path = tmp_path / "s.json"
    path.write_text("before")
    with pytest.raises(TypeError), arc.files.whole(path) as handle:
        handle.write(1)
    assert [file.name for file in tmp_path.iterdir()] == ["s.json"]
    assert path.read_text() == "before"
