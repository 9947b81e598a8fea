"""The flags that say what is read, and the passages that they name: ARC tasks, their answers, or texts of any kind."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import arc
import qwen_eqx
from qwen_lab import flags, prompts, prose, puzzles
from qwen_lab.bounds import Count
from qwen_lab.errors import InputError
from qwen_lab.passages import Corpus
from qwen_lab.prose import Fit, Texts

Mode = Literal["generate", "forward"]


class Unsaid(int):
    """The number of a flag that was not given, where another number may be meant then; no number that was equals it."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)


CONTEXT = Unsaid(1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfData:
    """What a model reads, and how."""

    mode: Mode = "generate"
    """How a model reads: it continues prompts (generate), or reads given tokens at once (forward)."""
    data: flags.Paths = ()
    """Other data, by name or path. Texts are .txt, .jsonl or .parquet with a field text or messages, directories of these,
    or owner/name of a Hugging Face data set; anything else is read as --tasks is. Without it --tasks."""
    answers: str = puzzles.RIGHT
    """What follows the prompts of ARC tasks that are read forward: right answers, none, or a predictions.jsonl of
    solve_arc.py."""
    context_length: Count = CONTEXT
    """Tokens of a document at most. Of texts; ARC tasks have what the model holds unless it is given."""
    fit: Fit = "split"
    """Documents of texts that are longer are skipped, or split; or all are packed into full contexts."""
    bos: str | None = None
    """Token that every context of texts begins with, such as <|endoftext|>; packed, every document too."""


def reads_texts(asked: Any) -> bool:
    """Whether the flags name texts; raises where they name puzzles beside them."""
    kinds = {source: prose.is_texts(source) for source in asked.data}
    if len(set(kinds.values())) > 1:
        texts = next(source for source, kind in kinds.items() if kind)
        other = next(source for source, kind in kinds.items() if not kind)
        raise InputError(f"--data: found texts ({texts}) and puzzles ({other}), expected one kind")
    return any(kinds.values())


def resolved(asked: Any, model: qwen_eqx.QwenConfig) -> Any:
    """The flags with numbers that nobody gave as they are meant: texts are all read, no context exceeds the model."""
    texts, length, limit = reads_texts(asked), asked.context_length, asked.limit
    if isinstance(length, Unsaid):
        length = min(int(length), model.max_seq) if texts else model.max_seq
    if length > model.max_seq:
        raise InputError(f"--context-length: found {length}, expected at most the model's {model.max_seq}")
    if isinstance(limit, Unsaid):
        limit = None if texts else int(limit)
    if texts and asked.mode != "forward":
        raise InputError("--mode generate: found texts, expected ARC tasks; --mode forward reads texts")
    return dataclasses.replace(asked, context_length=length, limit=limit)


def tasks_of(asked: Any) -> Iterator[arc.Task]:
    """The ARC tasks that flags name."""
    every = (task for source in asked.data or (asked.tasks,) for task in arc.iter_tasks(source))
    return itertools.islice(every, asked.limit)


def corpus(asked: Any, tokenizer: qwen_eqx.Tokenizer, budget: int) -> Corpus:
    """The passages that resolved flags name; `budget` is of a prompt's tokens with those of a given answer."""
    if reads_texts(asked):
        bos = None if asked.bos is None else tokenizer.token_to_id(asked.bos)
        return Texts(asked.data, tokenizer, asked.context_length, asked.fit, bos, asked.limit)
    asking = prompts.asking(tokenizer, budget=budget, encoder=asked.encoder, format=asked.prompt)

    tasks = functools.partial(tasks_of, asked)
    if asked.mode == "generate" or asked.answers in (puzzles.NONE, puzzles.RIGHT):
        return puzzles.Puzzles(
            tasks, tokenizer, asking, right=asked.mode == "forward" and asked.answers == puzzles.RIGHT
        )
    return puzzles.Answered(asked.answers, tasks, tokenizer, asking)
