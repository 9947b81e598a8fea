"""ARC tasks as prompts that fit a model, and as the tokens it reads."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import arc
import qwen_eqx
from arc.ask import Request
from arc.augment import IDENTITY
from arc.encode import Encoder, as_encoder
from arc.prompt import Prompt, PromptFormat, TooLong, as_format
from qwen_lab import wording
from qwen_lab.errors import InputError


@dataclasses.dataclass(frozen=True)
class Item:
    """One test input of one task, as it is asked and as tokens."""

    task: arc.Task
    request: Request
    tokens: list[int]

    @property
    def test(self) -> int:
        return self.request.test

    @property
    def prompt(self) -> Prompt:
        return self.request.prompt


def asking(
    tokenizer: qwen_eqx.Tokenizer,
    *,
    budget: int,
    encoder: str | Encoder | None = None,
    format: str | PromptFormat | None = None,
) -> arc.Asking:
    """How tasks are put to this tokenizer's model: in its chat template, if it has one, and in at most `budget` tokens.

    Encoder and format are those that the model's directory names, unless said.
    """
    if budget < 1:
        raise InputError(f"--max-new-tokens: found {1 - budget} more than leave room for a prompt, expected fewer")
    own = wording.USUAL | wording.of_model(tokenizer)
    return arc.Asking(
        encoder=as_encoder(encoder or own["encoder"]),
        format=as_format(format or own["prompt"]),
        template=tokenizer.render_chat if tokenizer.chat_template is not None else None,
        count=lambda text: len(tokenizer.encode(text)),
        budget=budget,
    )


def items(
    tasks: Sequence[arc.Task],
    tokenizer: qwen_eqx.Tokenizer,
    asking: arc.Asking,
    too_long: Literal["raise", "skip"] = "raise",
) -> list[Item]:
    """Every test input, whole training pairs left out to fit; one too long even with a single pair raises, or is skipped."""
    fitting = []
    for task in tasks:
        for test in range(len(task.test)):
            try:
                prompt = asking.prompt(task, test)
            except TooLong:
                if too_long == "raise":
                    raise
                continue
            request = Request(task.id, test, IDENTITY, prompt, as_encoder(asking.encoder))
            fitting.append(Item(task, request, tokenizer.encode(prompt.text)))
    some_fit(fitting, len(tasks), asking.budget)
    return fitting


def some_fit(fitting: Sequence[object], tasks: int, budget: int | None) -> None:
    """Raises where nothing is left to read."""
    if not tasks:
        raise InputError("--tasks: found no tasks, expected at least one")
    if not fitting:
        raise InputError(f"tokens at most {budget}: found no prompt of {tasks} tasks that fits, expected some")
