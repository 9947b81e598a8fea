"""ARC tasks put to a model: prompts under augmentations, completions by sampling or search, answers scored."""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np

import arc
import qwen_eqx
import sae
from arc.ask import Request
from arc.encode import FENCE, Encoder
from arc.prompt import TooLong
from qwen_eqx.text.ids import bucket
from qwen_lab import choosing, completions, puzzles
from qwen_lab.choosing import Choice
from qwen_lab.prompts import Item


@dataclasses.dataclass(frozen=True)
class Question:
    """One test input of one task under one augmentation; without a request where no prompt fits."""

    task: arc.Task
    test: int
    view: arc.Augmentation
    repeat: int
    """0, or how many questions before this one were the same."""
    request: Request | None
    tokens: list[int]
    too_long: str = ""

    @property
    def number(self) -> int:
        """What its randomness is folded from: the question alone, so that no other task, batch or resumption matters."""
        return zlib.crc32(f"{self.task.id} {self.test} {self.view} {self.repeat}".encode())


@dataclasses.dataclass(frozen=True)
class Answer:
    """One completion; `rows` are its activations where they were captured."""

    tokens: np.ndarray
    log_prob: float
    rows: sae.Rows | None = None


@dataclasses.dataclass(frozen=True)
class How:
    """How the model is asked for completions."""

    search: Literal["greedy", "sampled", "threshold"]
    sampler: qwen_eqx.AbstractSampler
    threshold: float
    max_new_tokens: int
    slots: int
    seed: int
    capture: qwen_eqx.Capture | None
    choice: Choice = Choice()  # noqa: RUF009  (frozen)


def views(task: arc.Task, count: int, seed: int, again: bool, **kinds: bool) -> list[tuple[arc.Augmentation, int]]:
    """`count` augmentations, the task as it stands first; `again`: where there are fewer, they come round once more."""
    options = {"pairs": len(task.train) if kinds.pop("pair_order") else 0, **kinds}
    for different in range(count, 0, -1):
        rng = np.random.default_rng([seed, zlib.crc32(task.id.encode())])
        try:
            drawn = arc.augment.sample_many(rng, different, **options)
        except arc.InputError:  # there are not so many
            if not again:
                raise
        else:
            return [(drawn[index % different], index // different) for index in range(count)]
    return []


def questions(
    task: arc.Task, asked: Sequence[tuple[arc.Augmentation, int]], asking: arc.Asking, tokenizer: qwen_eqx.Tokenizer
) -> list[Question]:
    """Every test input under every augmentation."""
    put = []
    for view, repeat in asked:
        try:
            requests: Sequence[Request | None] = list(arc.ask.requests(task, [view], asking))
            why = ""
        except TooLong as error:
            requests, why = [None] * len(task.test), str(error)
        for test, request in enumerate(requests):
            tokens = [] if request is None else tokenizer.encode(request.prompt.text)
            put.append(Question(task, test, view, repeat, request, tokens, why))
    return put


def complete(
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    asked: Sequence[Question],
    encoder: Encoder,
    how: How,
    first: int = 0,
) -> Iterator[list[Answer]]:
    """The answers to each question, in order; `first` is the store's number of the first one."""
    if how.search == "threshold":
        for question in asked:
            yield _search(model, tokenizer, question, encoder, how) if question.tokens else []
        return
    prompts = [question.tokens for question in asked if question.tokens]
    longest = max(map(len, prompts), default=1)
    finished = qwen_eqx.schedule(
        model,
        prompts,
        slots=how.slots,
        max_new_tokens=how.max_new_tokens,
        max_prompt_tokens=bucket(longest),  # few lengths, so few compilations
        order="arrival",
        sampler=how.sampler,
        stop_tokens=tokenizer.eos_ids,
        stop_sequences=closing_sequences(tokenizer, encoder),
        capture=how.capture,
        key=jax.random.key(how.seed),
        items=[question.number for question in asked if question.tokens],
        pad_token=tokenizer.pad_id,
    )
    for number, question in enumerate(asked, first):
        if not question.tokens:
            yield []
            continue
        done = next(finished)
        kept = None
        if done.activations is not None:
            kept = sae.Rows.of_sequence(question.tokens, done.tokens, number, done.activations, done.prompt_activations)
            kept = choosing.marked(kept, _read(question, number, done.tokens.tolist(), tokenizer), how.choice)
        yield [Answer(done.tokens, float(done.log_probs.sum()), kept)]


def _read(question: Question, number: int, tokens: list[int], tokenizer: qwen_eqx.Tokenizer) -> choosing.Read:
    """What a question and its answer are, position by position."""
    assert question.request is not None
    item = Item(question.task, question.request, question.tokens)
    grid = completions.as_sample(question.request, np.asarray(tokens, np.int32), 0.0, tokenizer).parsed.grid
    cells = puzzles.answered(item, tokens, grid, {}, tokenizer).marks
    assert cells is not None
    read = [*question.tokens, *tokens[:-1]]
    return choosing.Read(number, read, len(question.tokens), cells().first(len(read)), len(question.task.train))


def _search(
    model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, question: Question, encoder: Encoder, how: How
) -> list[Answer]:
    likely = qwen_eqx.threshold_search(
        model,
        question.tokens,
        p=how.threshold,
        max_new_tokens=how.max_new_tokens,
        stop_tokens=(*tokenizer.eos_ids, *closing_tokens(tokenizer, encoder)),
    )
    return [Answer(tokens, float(log_prob)) for tokens, log_prob in zip(likely.tokens, likely.log_probs, strict=True)]


def scorer(model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer) -> arc.vote.Score:
    """`score(prompt, completions)` as `arc.vote.rescore` wants it: sums of log-probabilities of the completions' tokens."""

    def score(prompt: str, completions: list[str]) -> list[float]:
        each = qwen_eqx.score(model, tokenizer.encode(prompt), [tokenizer.encode(text) for text in completions])
        return [float(log_probs.sum()) for log_probs in each]

    return score


@functools.cache
def closing_sequences(tokenizer: qwen_eqx.Tokenizer, encoder: Encoder) -> tuple[tuple[int, ...], ...]:
    """The ways this tokenizer writes the line end and fence that close an answer: base models do not stop there.

    Read off answers it has encoded, so whatever merges with the line end is part of them; a fence in pieces counts too.
    """
    if not encoder.opening:
        return ()
    closing: dict[tuple[int, ...], None] = {}
    for colour in range(10):
        written = encoder.encode(np.full((2, 2), colour, np.uint8))
        for tail in ("", "\n", "\n\n"):
            ids = tokenizer.encode(written + tail)
            while len(ids) > 1 and tokenizer.decode(ids[:-1]).endswith("\n" + FENCE):
                ids = ids[:-1]  # what follows the fence is not waited for
            start = next(at for at in reversed(range(len(ids))) if "\n" + FENCE in tokenizer.decode(ids[at:]))
            closing[tuple(ids[start:])] = None
    line_end = tuple(tokenizer.encode("\n"))
    for ids in list(closing):
        before = next(at for at in reversed(range(len(ids))) if tokenizer.decode(ids[at:]).startswith(FENCE))
        for head in (ids[:before], line_end):
            for pieces in ((FENCE,), ("``", "`"), ("`", "``"), ("`", "`", "`")):
                split = [tokenizer.encode(piece) for piece in pieces]
                if all(len(piece) == 1 for piece in split):
                    closing[(*head, *(piece[0] for piece in split))] = None
    return tuple(closing)


@functools.cache
def closing_tokens(tokenizer: qwen_eqx.Tokenizer, encoder: Encoder) -> tuple[int, ...]:
    """Single tokens that begin with a fence, for a search that stops at tokens only; the prompt holds the opening one."""
    if not encoder.opening:
        return ()
    return tuple(sorted(number for token, number in tokenizer.backend.get_vocab().items() if token.startswith(FENCE)))
