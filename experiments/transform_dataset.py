"""Turn a Hugging Face data set of ARC-like examples, or a local copy, into ARC tasks with their solutions apart.

Writes `challenges.json` and `solutions.json` in Kaggle's form, one task a line; `summary.json` says what was skipped.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import arc
from arc.data import content_id, reasons, task_from_examples
from arc.files import read_json, whole
from arc.records import STREAMED, dumps, hub_files, iter_records
from arc.task import Task
from qwen_lab import bounds, cli, files, locks, provenance, stopping
from qwen_lab.bounds import Count, CountOrNone
from qwen_lab.errors import INPUT_ERRORS, InputError

SAVE_EVERY = 500  # records between two savings of the state


@dataclass(frozen=True)
class Config:
    dataset: str = "barc0/200k_HEAVY_gpt4o-description-gpt4omini-code_generated_problems"
    """A hub data set (owner/name), a .jsonl or .parquet file, or a directory of them."""
    out: Path = Path("outputs/dataset")
    """Directory of what is written. These are challenges.json, solutions.json and summary.json."""
    max_samples: CountOrNone = None
    """Stop after so many tasks; None takes all. The source is streamed: the rest is never downloaded."""
    max_train_pairs: Count = 4
    """Training pairs kept per task, at least 2; the pair after them is the test."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""


@dataclass
class State:
    """How far the run has come: everything needed to go on as if it had never stopped."""

    config: dict[str, Any]
    file: int = 0
    record: int = 0
    tasks: int = 0
    challenges_bytes: int = 0
    solutions_bytes: int = 0
    duplicates: int = 0
    skipped: int = 0
    why: dict[str, int] | None = None


def sources(config: Config) -> list[str]:
    path = Path(config.dataset)
    if path.is_dir():
        inside = sorted(str(file) for file in path.iterdir() if file.suffix in STREAMED)
        if not inside:
            raise InputError(f"--dataset {path}: found no {' or '.join(STREAMED)} file, expected at least one")
        return inside
    if path.suffix in STREAMED or path.exists():
        if path.suffix not in STREAMED:
            raise InputError(f"--dataset {path}: found {path.suffix or 'no ending'}, expected {' or '.join(STREAMED)}")
        return [str(path)]
    return hub_files(config.dataset, config.revision)


def as_task(record: dict[str, Any], where: str, most: int) -> Task:
    """A task of 2 to `most` training pairs and one test, named by the hash of what it holds."""
    if "examples" not in record:
        raise InputError(f"{where}: found fields {sorted(record)[:6]}, expected a field 'examples'")
    pairs = task_from_examples(record, where)
    kept = (*pairs.train, *pairs.test)[: most + 1]
    if len(kept) < 3:
        raise InputError(f"{where}: found {len(kept)} pairs, expected at least 3: 2 to train, 1 to test")
    return Task(content_id(kept), kept[:-1], kept[-1:])


def records(paths: list[str], state: State) -> Iterator[tuple[str, dict[str, Any] | arc.InputError]]:
    """Records from where the state stands; it counts them as they are taken."""
    while state.file < len(paths):
        for entry in iter_records(paths[state.file], state.record):
            yield entry
            state.record += 1
        state.file, state.record = state.file + 1, 0


def resume(config: Config, wanted: dict[str, Any]) -> tuple[State, set[str]]:
    """The saved state and the ids already written; whatever was written after the last saving is cut off."""
    path = config.out / "state.json"
    if not path.exists():
        return State(wanted, why={}), set()
    state = read_state(path)
    for name, value in wanted.items():
        if state.config.get(name) != value:
            said = f"found a run with {name}={state.config.get(name)!r}, expected {value!r}"
            raise InputError(f"--out {config.out}: {said}; name another directory")
    sizes = {"challenges": state.challenges_bytes, "solutions": state.solutions_bytes}
    seen = {part: read_part(config.out / f"{part}.part", size, state.tasks) for part, size in sizes.items()}
    if seen["challenges"] != seen["solutions"]:
        raise InputError(
            f"{config.out / 'solutions.part'}: found other tasks than in challenges.part, expected the same"
        )
    for part, size in sizes.items():
        os.truncate(config.out / f"{part}.part", size)
    return state, set(seen["challenges"])


def read_state(path: Path) -> State:
    """What an earlier run saved of itself."""
    found = read_json(path)
    fields = {field.name: dict if field.name in ("config", "why") else int for field in dataclasses.fields(State)}
    right = isinstance(found, dict) and found.keys() == fields.keys()
    if not right or not all(type(found[name]) is kind for name, kind in fields.items()):
        raise InputError(f"{path}: found another file, expected what an earlier run saved: {', '.join(fields)}")
    if min(value for value in found.values() if isinstance(value, int)) < 0:
        raise InputError(f"{path}: found a number below 0, expected counts")
    return State(**found)


def read_part(path: Path, size: int, tasks: int) -> list[str]:
    """The ids of the tasks that stand in the first `size` bytes of a part file."""
    try:
        with open(path, "rb") as handle:
            data = handle.read(size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected {size:,} bytes of tasks") from None
    try:
        ids = [next(iter(json.loads(b"{" + line + b"}"))) for line in data.splitlines()]
    except (ValueError, StopIteration, RecursionError):
        ids = []
    if len(data) != size or len(ids) != tasks:
        found = f"{len(data):,} bytes and {len(ids)} tasks"
        raise InputError(f"{path}: found {found}, expected {size:,} bytes and {tasks} tasks; name another --out")
    return ids


def convert(config: Config, paths: list[str], state: State, seen: set[str]) -> None:
    """Append tasks to the part files; the state is saved beside them, also when a signal ends the run."""
    why: Counter[str] = Counter(state.why)
    with (
        open(config.out / "challenges.part", "a") as challenges,
        open(config.out / "solutions.part", "a") as solutions,
        cli.bar(config.max_samples, "transform", "tasks") as advance,
    ):

        def save() -> None:
            for handle in (challenges, solutions):
                handle.flush()
                os.fsync(handle.fileno())
            state.challenges_bytes, state.solutions_bytes = challenges.tell(), solutions.tell()
            state.why = dict(why)
            files.write_text(config.out / "state.json", json.dumps(asdict(state)))

        save()
        enough = state.tasks == config.max_samples  # of a run that was killed while it finished
        for number, (where, record) in enumerate([] if enough else records(paths, state), 1):
            try:
                if isinstance(record, arc.InputError):
                    raise record
                task = as_task(record, where, config.max_train_pairs)
            except INPUT_ERRORS as error:
                state.skipped += 1
                why.update(reasons([str(error)]))
            else:
                if task.id in seen:
                    state.duplicates += 1
                else:
                    seen.add(task.id)
                    output = task.test[0].output
                    assert output is not None  # task_from_examples reads no pair without one
                    challenges.write(f"{dumps(task.id)}:{dumps(task.without_answers().to_dict())}\n")
                    solutions.write(f"{dumps(task.id)}:{dumps([output.tolist()])}\n")
                    state.tasks += 1
                    advance(1)
            if number % SAVE_EVERY == 0 or stopping.asked():
                state.record += 1  # this record is done, though the iterator has not been asked for the next
                save()
                state.record -= 1
                stopping.check()
            if state.tasks == config.max_samples:
                break
        state.why = dict(why)


def finish(config: Config, state: State) -> None:
    """The part files become JSON objects, line by line, so that a gigabyte of tasks never lies in memory.

    The state goes before the parts, and after all else: a run that is killed in here is begun again, or is done.
    """
    out = config.out
    for name in ("challenges", "solutions"):
        with open(out / f"{name}.part") as lines, whole(out / f"{name}.json") as handle:
            handle.write("{")
            for number, line in enumerate(lines):
                handle.write(("\n" if number == 0 else ",\n") + line.rstrip("\n"))
            handle.write("\n}\n")
    summary = {"tasks": state.tasks, "duplicates": state.duplicates, "skipped": state.skipped, "why": state.why}
    files.write_json(out / "summary.json", summary)
    provenance.record_run(out, config)
    for name in ("state.json", "challenges.part", "solutions.part"):
        (out / name).unlink()


def finished(out: Path) -> bool:
    """Whether a run has ended there."""
    return (out / "challenges.json").exists() and not (out / "state.json").exists()


def check(config: Config) -> None:
    """Raises for flags that no run can have."""
    if config.max_train_pairs < 2:
        raise InputError(f"--max-train-pairs: found {config.max_train_pairs}, expected at least 2")
    bounds.check(config)


def main(config: Config) -> None:
    check(config)
    with locks.claimed(config.out):
        transform(config)


def transform(config: Config) -> None:
    """From the source, or from where an earlier run stopped, to the finished files."""
    wanted = {key: value for key, value in files.jsonable(config).items() if key != "out"}
    done = config.out / "challenges.json"
    if finished(config.out):
        raise InputError(f"{done}: found a finished run, expected another --out or no such file")
    paths = sources(config)
    cli.console.print(f"reading {len(paths)} file(s) of {config.dataset}")
    state, seen = resume(config, wanted)
    if state.tasks:
        cli.console.print(f"going on after {state.tasks} tasks")
    convert(config, paths, state, seen)
    finish(config, state)
    cli.console.print(f"{state.tasks} tasks, {state.duplicates} duplicates dropped, {state.skipped} skipped")
    for reason, number in Counter(state.why).most_common():
        cli.console.print(f"  skipped {number}: expected {reason}", markup=False)
    cli.console.print(f"wrote {done} and {config.out / 'solutions.json'}")
    cli.console.print(f"next: python experiments/extract.py --tasks {done}")


if __name__ == "__main__":
    cli.run(main, Config)
