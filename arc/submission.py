"""The file the competition reads: per task, per test input, two attempts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arc.errors import InputError
from arc.files import read_json, write_text
from arc.grid import Grid, as_grid
from arc.records import dumps
from arc.task import Task

ATTEMPTS = ("attempt_1", "attempt_2")
NOTHING = as_grid([[0]])  # what stands where no answer could be read

Predictions = Mapping[str, Sequence[Sequence[np.ndarray | None]]]
"""Task id -> per test input -> grids, best first; [[0]] stands where there is none."""
Submission = dict[str, list[tuple[Grid, Grid]]]


def from_predictions(predictions: Predictions, tasks: Sequence[Task] | None = None) -> Submission:
    """Two attempts for every test input; with `tasks`, those nobody answered are filled and strangers refused."""
    tests = {key: len(answers) for key, answers in predictions.items()}
    if tasks is not None:
        wanted = {task.id: len(task.test) for task in tasks}
        for key, number in tests.items():
            if key not in wanted:
                raise InputError(f"predictions, task {key}: found a task that was not asked, expected one of the tasks")
            if number > wanted[key]:
                raise InputError(f"predictions, task {key}: found {number} test inputs, expected {wanted[key]}")
        tests = wanted
    made: Submission = {}
    for key, number in tests.items():
        if number < 1:
            raise InputError(f"predictions, task {key}: found no test inputs, expected at least 1")
        answers = [list(ranked) for ranked in predictions.get(key, ())]
        answers += [[] for _ in range(number - len(answers))]
        made[key] = [_two(ranked, f"predictions, task {key}, test {index}") for index, ranked in enumerate(answers)]
    return made


def _two(ranked: Sequence[np.ndarray | None], where: str) -> tuple[Grid, Grid]:
    grids = [as_grid(grid, where) for grid in ranked if grid is not None][:2]
    if not grids:
        return NOTHING, NOTHING
    return grids[0], grids[-1]  # a lone answer stands twice: [[0]] is the true answer of one bundled test


def to_json(submission: Submission) -> dict[str, list[dict[str, list[list[int]]]]]:
    """Kaggle's object."""
    return {
        key: [{name: grid.tolist() for name, grid in zip(ATTEMPTS, pair, strict=True)} for pair in pairs]
        for key, pairs in submission.items()
    }


def write(path: str | Path, predictions: Predictions, tasks: Sequence[Task] | None = None) -> Submission:
    """Write `submission.json`, valid by construction, and return what it holds."""
    made = from_predictions(predictions, tasks)
    lines = ",\n".join(f"{dumps(key)}:{dumps(value)}" for key, value in to_json(made).items())
    write_text(Path(path), "{\n" + lines + "\n}\n")
    return made


def read(path: str | Path, tasks: Sequence[Task] | None = None) -> Submission:
    """Read a submission back, every entry checked; with `tasks`, none of them may be missing."""
    return validate(read_json(Path(path)), str(path), tasks)


def validate(value: Any, where: str = "submission", tasks: Sequence[Task] | None = None) -> Submission:
    """A submission from Kaggle's object."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: found a JSON {type(value).__name__}, expected an object of task ids")
    read_back = {str(key): _entries(entries, f"{where}, task {key}") for key, entries in value.items()}
    for task in tasks or ():
        if task.id not in read_back:
            raise InputError(f"{where}, task {task.id}: found nothing, expected an entry for every task")
        if len(read_back[task.id]) != len(task.test):
            found, wanted = len(read_back[task.id]), len(task.test)
            raise InputError(f"{where}, task {task.id}: found {found} test inputs, expected {wanted}")
    return read_back


def _entries(entries: Any, where: str) -> list[tuple[Grid, Grid]]:
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: found {type(entries).__name__}, expected a list with one entry per test input")
    read_back = []
    for index, entry in enumerate(entries):
        place = f"{where}, test {index}"
        if not isinstance(entry, dict) or set(entry) != set(ATTEMPTS):
            found = f"keys {sorted(map(str, entry))}" if isinstance(entry, dict) else f"a JSON {type(entry).__name__}"
            raise InputError(f"{place}: found {found}, expected {' and '.join(ATTEMPTS)}")
        first, second = (as_grid(entry[name], f"{place}, {name}") for name in ATTEMPTS)
        read_back.append((first, second))
    return read_back
