"""How good the answers are, as the competition counts and in finer measures; every rate is a share, 1 is best."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from arc.ask import Sample
from arc.errors import InputError
from arc.grid import Grid
from arc.submission import Submission, read, validate
from arc.task import Task, same


def score(submission: str | Path | Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """Mean over tasks of the share of their test inputs that one of two attempts has exactly right.

    A path, Kaggle's object, or what `arc.submission.write` returned; every task must have an entry.
    """
    solved = per_task(submission, tasks)
    return sum(solved.values()) / len(solved)


def per_task(submission: str | Path | Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, float]:
    """Task id -> share of its test inputs solved."""
    if not tasks:
        raise InputError("tasks: found none, expected at least 1 to score")
    checked = _checked(submission, tasks)
    return {
        task.id: sum(
            any(same(grid, truth(task, test)) for grid in attempts) for test, attempts in enumerate(checked[task.id])
        )
        / len(task.test)
        for task in tasks
    }


def _checked(submission: str | Path | Mapping[str, Any], tasks: Sequence[Task]) -> Submission:
    if isinstance(submission, str | Path):
        return read(submission, tasks)
    plain = {
        key: [
            dict(zip(("attempt_1", "attempt_2"), entry, strict=True)) if isinstance(entry, tuple) else entry
            for entry in entries
        ]
        if isinstance(entries, list)
        else entries
        for key, entries in submission.items()
    }
    return validate(plain, tasks=tasks)


def truth(task: Task, test: int) -> Grid:
    output = task.test[test].output
    if output is None:
        raise InputError(f"task {task.id}, test pair {test}: found no output, expected one to score against")
    return output


def pass_at(n: int, samples: int, right: int) -> float:
    """Chance that one of `n` samples drawn without return is right: 1 - C(samples - right, n) / C(samples, n)
    (Chen et al. 2021, eq. 1)."""
    if not 1 <= n <= samples or not 0 <= right <= samples:
        raise InputError(f"pass@{n}: found {samples} samples, {right} right, expected n, right <= samples")
    return 1.0 - comb(samples - right, n) / comb(samples, n)


@dataclass(frozen=True)
class Row:
    """One task of the table; counts are over all samples of all its test inputs."""

    task_id: str
    solved: float
    """Share of its test inputs that the submission has right."""
    samples: int
    parsed: int
    right_size: int
    right: int
    reasons: dict[str, int]
    """Why samples did not parse."""


@dataclass(frozen=True)
class Report:
    """The whole run."""

    score: float
    """Mean over tasks: what the leaderboard of ARC-AGI shows."""
    per_output: float
    """Mean over test inputs: what Kaggle shows."""
    pass_at: dict[int, float]
    """n -> mean over test inputs of the chance that one of n samples is right; test inputs with fewer samples count
    with all they have; no n beyond the most samples that one has."""
    parse_rate: float
    right_size_rate: float
    """Share of all samples whose grid has the true shape."""
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return f"Report(score {self.score:.1%} of {len(self.rows):,} tasks; str() has the table)"

    def __str__(self) -> str:
        passes = "  ".join(f"pass@{n} {value:.1%}" for n, value in self.pass_at.items())
        head = (
            f"score {self.score:.1%} of {len(self.rows)} tasks  per output {self.per_output:.1%}  {passes}  "
            f"parsed {self.parse_rate:.1%}  right size {self.right_size_rate:.1%}"
        )
        width = max([4, *(len(row.task_id) for row in self.rows)])
        lines = [f"{'task':<{width}}  solved  samples  parsed  size  right  not parsed because"]
        for row in self.rows:
            why = ", ".join(f"{reason} {number}" for reason, number in row.reasons.items())
            line = f"{row.task_id:<{width}}  {row.solved:>6.0%}  {row.samples:>7}  {row.parsed:>6}"
            lines.append(f"{line}  {row.right_size:>4}  {row.right:>5}  {why}".rstrip())
        return "\n".join([head, "", *lines])


def evaluate(
    samples: Iterable[Sample],
    submission: str | Path | Mapping[str, Any],
    tasks: Sequence[Task],
    n: Sequence[int] = (1, 2, 4, 8),
) -> Report:
    """Everything that can be said of a run whose answers are known."""
    by_test: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_test[sample.task_id, sample.test].append(sample)
    solved = per_task(submission, tasks)
    rows, outcomes = [], []
    for task in tasks:
        all_of, counts = [], Counter()
        for test in range(len(task.test)):
            mine, answer = by_test[task.id, test], truth(task, test)
            right = sum(sample.grid is not None and same(sample.grid, answer) for sample in mine)
            counts["size"] += sum(sample.grid is not None and sample.grid.shape == answer.shape for sample in mine)
            counts["right"] += right
            outcomes.append((len(mine), right))
            all_of += mine
        reasons = Counter(str(sample.parsed.reason) for sample in all_of if sample.grid is None)
        parsed = len(all_of) - reasons.total()
        row = Row(task.id, solved[task.id], len(all_of), parsed, counts["size"], counts["right"], dict(reasons))
        rows.append(row)
    total = max(1, sum(row.samples for row in rows))
    tests = {task.id: len(task.test) for task in tasks}
    return Report(
        score=sum(solved.values()) / len(solved),
        per_output=sum(solved[key] * number for key, number in tests.items()) / sum(tests.values()),
        pass_at={k: _mean_pass(k, outcomes) for k in n if k <= max(made for made, _ in outcomes)},
        parse_rate=sum(row.parsed for row in rows) / total,
        right_size_rate=sum(row.right_size for row in rows) / total,
        rows=tuple(rows),
    )


def _mean_pass(n: int, outcomes: Sequence[tuple[int, int]]) -> float:
    chances = [pass_at(min(n, samples), samples, right) if samples else 0.0 for samples, right in outcomes]
    return sum(chances) / len(chances)
