"""Files of an earlier run that were damaged: one line, exit 2, and nothing is believed that was changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge import at_edge, refused
from running import short_tasks

SOLVE = "--limit 2 --max-new-tokens 2 --predictions-per-task 2"
TRAIN = (
    "--limit 3 --held-out 1 --max-new-tokens 2 --d-sae 32 --k 4 --steps 4 --batch-size 32 --steps-per-call 2 "
    "--max-prompt 512 --buffer-rows 8192"
)


def replaced_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def edit_line(path: Path, number: int, **fields: Any) -> None:
    """Changes fields of a line of JSONL; a value of ... removes one."""
    lines = path.read_text().splitlines()
    line = json.loads(lines[number]) | fields
    lines[number] = json.dumps({name: value for name, value in line.items() if value is not ...})
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    where = tmp_path_factory.mktemp("solved")
    flags = [*SOLVE.split(), "--tasks", str(short_tasks(where))]
    assert at_edge("solve_arc", *flags, "--out", str(where / "out"))[0] == 0
    return where / "out", flags


SOLVE_DAMAGE = {
    "predictions is a directory": lambda out: replaced_by_directory(out / "predictions.jsonl"),
    "resume is a directory": lambda out: replaced_by_directory(out / "resume.json"),
    "report is a directory": lambda out: replaced_by_directory(out / "report.html"),
    "resume is nested": lambda out: (out / "resume.json").write_text("[" * 100_000 + "]" * 100_000),
    "resume is a list": lambda out: (out / "resume.json").write_text("[1]"),
    "no text": lambda out: edit_line(out / "predictions.jsonl", 0, text=...),
    "no log_prob": lambda out: edit_line(out / "predictions.jsonl", 0, log_prob=None),
    "log_prob is NaN": lambda out: edit_line(out / "predictions.jsonl", 0, log_prob=float("nan")),
    "another test": lambda out: edit_line(out / "predictions.jsonl", 0, test=1),
    "another text": lambda out: edit_line(out / "predictions.jsonl", 0, text="[[1]]"),
    "another augmentation": lambda out: edit_line(out / "predictions.jsonl", 1, augmentation="rot90"),
}


@pytest.mark.parametrize("name", SOLVE_DAMAGE)
def test_damaged_predictions_are_refused(name: str, solved: tuple[Path, list[str]], tmp_path: Path):
    out, flags = tmp_path / "out", solved[1]
    shutil.copytree(solved[0], out)
    SOLVE_DAMAGE[name](out)
    assert str(out) in refused("solve_arc", *flags, "--out", str(out))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    where = tmp_path_factory.mktemp("trained")
    flags = [*TRAIN.split(), "--tasks", str(short_tasks(where))]
    assert at_edge("train_sae", *flags, "--out", str(where / "out"))[0] == 0
    return where / "out", flags


def edit_cursor(out: Path, **fields: Any) -> None:
    path = out / "checkpoints" / "00000004" / "state.json"
    note = json.loads(path.read_text())
    note["cursor"] = {name: value for name, value in (note["cursor"] | fields).items() if value is not ...}
    path.write_text(json.dumps(note))


def checkpoints_as_file(out: Path) -> None:
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").write_text("")


TRAIN_DAMAGE = {
    "checkpoints is a file": checkpoints_as_file,
    "no config": lambda out: edit_cursor(out, config=...),
    "config is a list": lambda out: edit_cursor(out, config=[1]),
    "next_group is text": lambda out: edit_cursor(out, next_group="x"),
    "another next_group": lambda out: edit_cursor(out, next_group=77),
    "history is a number": lambda out: edit_cursor(out, history=3),
    "metrics is a directory": lambda out: replaced_by_directory(out / "metrics.json"),
}


@pytest.mark.parametrize("name", TRAIN_DAMAGE)
def test_damaged_checkpoints_are_refused(name: str, trained: tuple[Path, list[str]], tmp_path: Path):
    out, flags = tmp_path / "out", trained[1]
    shutil.copytree(trained[0], out)
    TRAIN_DAMAGE[name](out)
    assert str(out) in refused("train_sae", *flags, "--out", str(out))


@pytest.mark.parametrize("value", [3, "abc", [1, 2], [["a"]], {"a": 1}])
@pytest.mark.parametrize("command", ["evaluate_sae", "steer"])
def test_held_out_tasks_that_are_no_names_are_refused(
    command: str, value: Any, trained: tuple[Path, list[str]], tmp_path
):
    shutil.copytree(trained[0] / "sae", tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    said = json.loads(path.read_text())
    there = said["metadata"] if "held_out_tasks" in said.get("metadata", {}) else said
    there["held_out_tasks"] = value
    path.write_text(json.dumps(said))
    line = refused(command, "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "out"))
    assert "held_out_tasks" in line


STATES = [
    "",
    "[]",
    "{}",
    '{"config": {}}',
    '{"config": 3}',
    '{"config": {}, "tasks": "x"}',
    '{"config": {}, "other": 1}',
]


def interrupted(where: Path) -> tuple[Path, list[str]]:
    """A run of transform_dataset that was cut off after three tasks."""
    data, out = where / "data.jsonl", where / "out"
    pairs = [[[[[colour]], [[number]]] for colour in range(4)] for number in range(3)]
    data.write_text("".join(json.dumps({"examples": each}) + "\n" for each in pairs))
    flags = ["--dataset", str(data), "--out", str(out)]
    assert at_edge("transform_dataset", *flags)[0] == 0
    config = {"dataset": str(data), "max_samples": None, "max_train_pairs": 4, "revision": "main"}
    sizes = {}
    for name in ("challenges", "solutions"):
        kept = json.loads((out / f"{name}.json").read_text())
        text = "".join(f"{json.dumps(key)}:{json.dumps(value)}\n" for key, value in kept.items())
        (out / f"{name}.part").write_text(text)
        sizes[f"{name}_bytes"] = len(text)
        (out / f"{name}.json").unlink()
    state = {"config": config, "file": 0, "record": 3, "tasks": 3, "duplicates": 0, "skipped": 0, "why": {}} | sizes
    (out / "state.json").write_text(json.dumps(state))
    return out, flags


@pytest.mark.parametrize("state", STATES)
def test_a_damaged_state_of_transform_is_refused(state: str, tmp_path: Path):
    out, flags = interrupted(tmp_path)
    (out / "state.json").write_text(state)
    assert "state.json" in refused("transform_dataset", *flags)


@pytest.mark.parametrize("name", ["challenges", "solutions"])
@pytest.mark.parametrize("text", [None, "", "foreign\n" * 400])
def test_damaged_parts_of_transform_are_refused(name: str, text: str | None, tmp_path: Path):
    out, flags = interrupted(tmp_path)
    if text is None:
        (out / f"{name}.part").unlink()
    else:
        (out / f"{name}.part").write_text(text)
    assert f"{name}.part" in refused("transform_dataset", *flags)


def test_what_was_cut_off_goes_on(tmp_path: Path):
    _, flags = interrupted(tmp_path)
    assert at_edge("transform_dataset", *flags)[0] == 0
