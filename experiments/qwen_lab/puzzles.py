"""ARC tasks as passages: prompts to be answered, or prompts read with their right answers or with given completions."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import arc
import qwen_eqx
from arc.ask import Request
from arc.prompt import TooLong
from arc.records import iter_records
from qwen_lab import completions, marks, prompts
from qwen_lab.errors import InputError
from qwen_lab.passages import Cursor, Passage, Segment, by_record

NONE, RIGHT = "none", "right"


@dataclasses.dataclass(frozen=True)
class Puzzles:
    """Every test input of every task; a prompt that exceeds the asking's budget loses whole training pairs."""

    tasks: Callable[[], Iterable[arc.Task]]
    tokenizer: qwen_eqx.Tokenizer
    asking: arc.Asking
    right: bool = False  # each with its right answer, where that is known

    def read(self, segments: Iterable[Segment]) -> Iterator[tuple[Cursor, Passage]]:
        """A cursor counts tasks, and the test inputs of one."""
        return by_record(lambda start: itertools.islice(enumerate(self.tasks()), start, None), self._cut, segments)

    def _cut(self, number: int, task: arc.Task) -> list[Passage]:
        return [self._passage(task, test) for test in range(len(task.test))]

    def _passage(self, task: arc.Task, test: int) -> Passage:
        truth = task.test[test].output if self.right else None
        encoder = arc.encode.as_encoder(self.asking.encoder)
        text = "" if truth is None else encoder.encode(truth)[len(encoder.opening) :]
        answer = self.tokenizer.encode(text)
        asking = self.asking
        if asking.budget is not None:
            asking = dataclasses.replace(asking, budget=asking.budget - len(answer))
        try:
            prompt = asking.prompt(task, test)
        except TooLong as error:
            return _skipped({"task": task.id, "test": test}, str(error))
        request = Request(task.id, test, arc.augment.IDENTITY, prompt, encoder)
        item = prompts.Item(task, request, self.tokenizer.encode(prompt.text))
        said = {"text": text, "outcome": "prompt" if truth is None else "correct"}
        return answered(item, answer, truth, said, self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Answered:
    """The completions of a predictions.jsonl that solve_arc.py wrote, each after the prompt that it answers."""

    path: str
    tasks: Callable[[], Iterable[arc.Task]]
    tokenizer: qwen_eqx.Tokenizer
    asking: arc.Asking

    def read(self, segments: Iterable[Segment]) -> Iterator[tuple[Cursor, Passage]]:
        """A cursor counts lines of the file."""
        known = {task.id: task for task in self.tasks()}

        def lines(start: int) -> Iterator[tuple[int, tuple[str, Any]]]:
            numbered = enumerate(iter_records(self.path, start), start)
            return (each for each in numbered if isinstance(each[1][1], Exception) or each[1][1].get("task") in known)

        return by_record(lines, lambda _, record: [self._passage(*record, known)], segments)

    def _passage(self, where: str, line: Any, known: dict[str, arc.Task]) -> Passage:
        if isinstance(line, Exception):
            raise line
        try:
            task, test, view = known[line["task"]], int(line["test"]), arc.Augmentation.parse(line["augmentation"])
            text, length = line["text"], int(line["prompt_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: found {error!r:.80}, expected a line of solve_arc.py's predictions") from None
        if text is None or not 0 <= test < len(task.test):
            return _skipped({"task": task.id, "test": test, "augmentation": str(view)}, str(line.get("detail")))
        # as many pairs as were left when it was answered: the budget that was met exactly
        asking = dataclasses.replace(self.asking, budget=length)
        request, tokens = None, []
        with contextlib.suppress(TooLong):
            request = list(arc.ask.requests(task, [view], asking))[test]
            tokens = self.tokenizer.encode(request.prompt.text)
        if request is None or len(tokens) != length:
            raise InputError(
                f"{where}: prompt_tokens: found {length}, expected {len(tokens) or 'fewer'}: the completions of this "
                "model's prompts; name the same --tasks, --model, --encoder and --prompt"
            )
        sample = arc.ask.read(request, text)
        said = {"text": text, "outcome": completions.outcome(sample, task), "augmentation": str(view)}
        answer = self.tokenizer.encode(text)
        return answered(prompts.Item(task, request, tokens), answer, sample.parsed.grid, said, self.tokenizer)


def answered(
    item: prompts.Item, answer: list[int], grid: arc.Grid | None, said: dict[str, Any], tokenizer: qwen_eqx.Tokenizer
) -> Passage:
    """A prompt with what was answered; `grid` is what that reads as, under the item's augmentation."""

    def cells() -> marks.Marks:
        pairs = len(item.task.train)
        of_prompt = marks.of_prompt(item.request, tokenizer)
        return of_prompt.then(marks.of_answer(item.request, grid, answer, tokenizer, pairs)) if answer else of_prompt

    return Passage(
        [*item.tokens, *answer],
        of_item(item) | said | {"tokens": len(answer)},
        len(item.tokens) if answer else None,
        cells,
        item,
    )


def of_item(item: prompts.Item) -> dict[str, Any]:
    """What a sidecar says of a prompt."""
    return {
        "task": item.task.id,
        "test": item.test,
        "prompt_tokens": len(item.tokens),
        "dropped_pairs": list(item.prompt.dropped),
    }


def _skipped(said: dict[str, Any], why: str) -> Passage:
    return Passage([], said | {"prompt_tokens": 0, "tokens": 0, "text": "", "outcome": "too long", "detail": why})
