"""predictions.jsonl: one line per completion, a task's lines together, appended when the task is done."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import arc
import qwen_eqx
from qwen_lab import completions, extending, files
from qwen_lab.answering import Answer, Question
from qwen_lab.errors import InputError

Line = dict[str, Any]
RESCORED = "rescore"


def line(question: Question, answer: Answer | None, tokenizer: qwen_eqx.Tokenizer) -> tuple[Line, arc.Sample | None]:
    """What is kept of one completion, and how it reads; of a question without one, why there is none."""
    fields: Line = {"task": question.task.id, "test": question.test, "augmentation": str(question.view)}
    fields |= {"repeat": question.repeat, "prompt_tokens": len(question.tokens)}
    if question.request is None or answer is None:
        why = "prompt too long" if question.too_long else "none so probable"
        return fields | {"text": None, "outcome": why, "detail": question.too_long}, None
    sample = completions.as_sample(question.request, answer.tokens, answer.log_prob, tokenizer)
    fields |= {
        "dropped_pairs": list(question.request.prompt.dropped),
        "tokens": len(answer.tokens),
        "log_prob": answer.log_prob,
        "text": sample.completion.text,
        "outcome": completions.outcome(sample, question.task),
        "detail": sample.parsed.detail,
        "notes": list(sample.parsed.notes),
        "grid": None if sample.grid is None else sample.grid.tolist(),
    }
    return fields, sample


def samples_of(lines: Sequence[Line], encoder: str, begun: str) -> list[arc.Sample]:
    """The completions of lines read back, parsed anew."""
    samples = []
    for fields in lines:
        if fields["text"] is not None:
            view = arc.Augmentation.parse(fields["augmentation"])
            parsed = arc.parse.parse(fields["text"], encoder, begun)
            grid = None if parsed.grid is None else view.invert(parsed.grid)
            completion = arc.Completion(fields["text"], fields["log_prob"])
            samples.append(arc.Sample(fields["task"], fields["test"], view, completion, parsed, grid))
    return samples


def rank(samples: Sequence[arc.Sample], lines: Sequence[Line], select: str) -> list[arc.vote.Candidate]:
    """Candidates for one test input, best first; rescored ones by the `score` that their lines hold."""
    if select != RESCORED:
        return arc.SELECT[select](samples)
    scores = {json.dumps(fields["grid"]): fields["score"] for fields in lines if fields.get("score") is not None}
    ranked = [replace(c, score=scores.get(json.dumps(c.grid.tolist()))) for c in arc.vote.by_count(samples)]
    return sorted(ranked, key=lambda c: -np.inf if c.score is None else c.score, reverse=True)  # stable among equals


def choose(
    task: arc.Task, lines: Sequence[Line], encoder: str, begun: str, select: str
) -> list[list[arc.vote.Candidate]]:
    """Candidates for each test input of a task, best first."""
    ranked = []
    for test in range(len(task.test)):
        mine = [fields for fields in lines if fields["test"] == test]
        ranked.append(rank(samples_of(mine, encoder, begun), mine, select))
    return ranked


def has_answers(task: arc.Task) -> bool:
    return all(pair.output is not None for pair in task.test)


class Tally:
    """What is solved and parsed so far, for the progress bar."""

    def __init__(self, choose: Callable[[arc.Task, Sequence[Line]], list[list[arc.vote.Candidate]]]):
        self.choose, self.solved, self.parsed, self.all = choose, 0.0, 0, 0

    def add(self, task: arc.Task, lines: Sequence[Line]) -> None:
        self.all += len(lines)
        self.parsed += sum(fields.get("grid") is not None for fields in lines)
        if has_answers(task):
            grids = [[candidate.grid for candidate in ranked] for ranked in self.choose(task, lines)]
            self.solved += arc.score(arc.submission.to_json(arc.submission.from_predictions({task.id: grids})), [task])

    def note(self, known: int) -> str:
        return f"{self.solved:g}/{known} solved, {self.parsed / max(1, self.all):.0%} parsed"


def same_run(directory: Path, settled: dict[str, Any], tasks_digest: Callable[[int | None], str]) -> None:
    """Writes what a resumed run must agree with; raises, naming the differences, if another run stands there.

    `tasks_digest(limit)` is of the first tasks: a run that was begun with a lower limit must have had those.
    """
    path, limit = directory / "resume.json", settled["limit"]
    wanted = settled | {"tasks_digest": tasks_digest(limit)}
    if not path.exists():
        if (directory / "predictions.jsonl").exists():
            raise InputError(f"--out {directory}: found predictions.jsonl without resume.json, expected both or none")
        files.write_json(path, wanted)
        return
    try:
        there = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise InputError(f"{path}: found no JSON object, expected what an earlier run wrote") from None
    expected = wanted
    if extending.raised(directory, "limit", there.get("limit"), limit):
        expected = wanted | {"limit": there["limit"], "tasks_digest": tasks_digest(there["limit"])}
    differences = [
        f"{name}={there.get(name)!r} there, {expected.get(name)!r} here"
        for name in sorted(there.keys() | expected.keys())
        if there.get(name) != expected.get(name)
    ]
    if differences:
        raise InputError(f"--out {directory}: found another run, expected the same: {'; '.join(differences)}")
    if there != wanted:
        files.write_json(path, wanted)


def _believed(fields: Line) -> bool:
    """Whether a line is as it was written; those written before lines had digests must have what is read of them."""
    if "digest" in fields:
        return fields["digest"] == mark(fields)
    number = isinstance(fields.get("log_prob"), float) and np.isfinite(fields["log_prob"])
    return "test" in fields and "augmentation" in fields and (fields["text"] is None or number)


def mark(fields: Line) -> str:
    """Sixteen digits of the digest of all else that a line says: what is read back is what was written."""
    return files.digest({name: value for name, value in fields.items() if name != "digest"})[7:23]


class File:
    """The file as it grows; opening it drops what a kill left half-written: a cut line, a task without all its lines."""

    def __init__(self, path: Path, tasks: Sequence[arc.Task]):
        self.path = path
        self.done: list[list[Line]] = []
        self._ends = [0]
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: found a directory, expected a file")
        data = path.read_bytes() if path.exists() else b""
        at = 0
        while at < len(data):
            block, end = self._block(data, at, tasks)
            if block is None:
                break
            self.done.append(block)
            self._ends.append(end)
            at = end

    def _block(self, data: bytes, at: int, tasks: Sequence[arc.Task]) -> tuple[list[Line] | None, int]:
        """The lines of the next task, and where they end; None if they are not all there."""
        block: list[Line] = []
        while not block or len(block) < block[0]["of"]:
            stop = data.find(b"\n", at)
            if stop < 0:
                return None, at
            block.append(self._line(data[at:stop], block, tasks))
            at = stop + 1
        return block, at

    def _line(self, text: bytes, block: list[Line], tasks: Sequence[arc.Task]) -> Line:
        expected = tasks[len(self.done)].id if len(self.done) < len(tasks) else "no further line"
        try:
            fields: Line = dict(json.loads(text))
            right = fields["task"] == expected and fields["prediction"] == len(block) < fields["of"]
            if right and not _believed(fields):
                number = sum(map(len, self.done)) + len(block) + 1
                raise InputError(
                    f"{self.path}: line {number}: found other fields than were written, expected its digest's"
                )
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError):
            fields, right = {}, False
        if not right:
            said = f"task {fields['task']!r}" if "task" in fields else repr(text[:40])
            number = sum(map(len, self.done)) + len(block) + 1
            raise InputError(f"{self.path}: line {number}: found {said}, expected line {len(block)} of task {expected}")
        return fields

    def keep(self, tasks: int) -> None:
        """Cuts the file after its first tasks."""
        self.done, self._ends = self.done[:tasks], self._ends[: tasks + 1]
        if self.path.exists():
            with open(self.path, "r+b") as handle:
                handle.truncate(self._ends[-1])
                os.fsync(handle.fileno())

    def append(self, lines: Sequence[Line]) -> None:
        """A whole task; after this it survives a power cut."""
        numbered = [{**fields, "prediction": index, "of": len(lines)} for index, fields in enumerate(lines)]
        numbered = [{**fields, "digest": mark(fields)} for fields in numbered]
        data = "".join(json.dumps(fields) + "\n" for fields in numbered).encode()
        with open(self.path, "ab") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        self.done.append(numbered)
        self._ends.append(self._ends[-1] + len(data))
