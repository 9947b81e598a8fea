"""A task put to a model: augmented prompts out, completions back in, answers turned to where the task stands."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from arc.augment import IDENTITY, Augmentation
from arc.encode import DEFAULT_ENCODER, Encoder, as_encoder
from arc.errors import InputError
from arc.grid import Grid
from arc.parse import Parsed, parse
from arc.prompt import DEFAULT_PROMPT, Prompt, PromptFormat, build
from arc.task import Task


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt, and the sum of the log-probabilities of its tokens."""

    text: str
    log_prob: float = 0.0


@dataclass(frozen=True)
class Request:
    """One prompt and what is needed to understand the answer."""

    task_id: str
    test: int
    augmentation: Augmentation
    prompt: Prompt
    encoder: Encoder


@dataclass(frozen=True)
class Sample:
    """One answer to one test input, turned back; `parsed` is how the model's own grid read."""

    task_id: str
    test: int
    augmentation: Augmentation
    completion: Completion
    parsed: Parsed
    grid: Grid | None

    def __repr__(self) -> str:
        return f"Sample({self.task_id:.40}, test {self.test}, {self.augmentation}, {self.parsed})"


Complete = Callable[[list[str]], Sequence[str | Completion | Sequence[Completion]]]
"""Prompts to completions, in order; several for one prompt where a search finds several."""


@dataclass(frozen=True)
class Asking:
    """How tasks are put: encoder, prompt format, chat template, and a length budget in the units of `count`."""

    encoder: str | Encoder = DEFAULT_ENCODER
    format: str | PromptFormat = DEFAULT_PROMPT
    template: Callable[..., str] | None = None
    begin: bool = True
    """Write the opening of the answer into the prompt."""
    count: Callable[[str], int] | None = None
    budget: int | None = None

    def prompt(self, task: Task, test: int) -> Prompt:
        """One test input put this way."""
        return build(
            task, test, encoder=self.encoder, format=self.format, template=self.template,
            begin=self.begin, count=self.count, budget=self.budget,
        )  # fmt: skip


def requests(
    task: Task, augmentations: Iterable[Augmentation] = (IDENTITY,), asking: Asking | None = None
) -> Iterator[Request]:
    """Every test input under every augmentation."""
    how = asking or Asking()
    encoder = as_encoder(how.encoder)
    for augmentation in augmentations:
        augmented = augmentation.apply(task)
        for test in range(len(task.test)):
            yield Request(task.id, test, augmentation, how.prompt(augmented, test), encoder)


def read(request: Request, completion: str | Completion) -> Sample:
    """The answer to a request."""
    completion = Completion(completion) if isinstance(completion, str) else completion
    parsed = parse(completion.text, request.encoder, request.prompt.begun)
    grid = None if parsed.grid is None else request.augmentation.invert(parsed.grid)
    return Sample(request.task_id, request.test, request.augmentation, completion, parsed, grid)


def ask(asked: Sequence[Request], complete: Complete) -> list[Sample]:
    """All requests in one call of `complete`."""
    replies = complete([request.prompt.text for request in asked])
    if len(replies) != len(asked):
        raise InputError(f"complete: found {len(replies)} completions, expected {len(asked)}, one per prompt")
    samples = []
    for request, reply in zip(asked, replies, strict=True):
        several = [reply] if isinstance(reply, str | Completion) else reply
        samples += [read(request, completion) for completion in several]
    return samples
