"""How well a model solves tasks: greedy and by votes over augmentations, beside answers that need no model."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import arc
import qwen_eqx
from arc.encode import as_encoder
from qwen_lab import answering, prompts

GROUP = 32  # tasks that share the slots


@dataclasses.dataclass(frozen=True)
class Mark:
    """What became of one test input."""

    family: str
    """Or the data set, of tasks that have none."""
    greedy: bool
    voted: bool
    """The most frequent answer under the augmentations, where several were asked for."""
    fits: bool
    """Whether the prompt fits the model; what does not counts as wrong."""


def examine(
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    tasks: Sequence[tuple[str, arc.Task]],
    asking: arc.Asking,
    *,
    votes: int,
    max_new_tokens: int,
    slots: int = 32,
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[Mark]:
    """The mark of each test input of (family, task), in order; `votes` = 1 asks greedily alone."""
    how = answering.How("greedy", qwen_eqx.Greedy(), 0.0, max_new_tokens, slots, 0, None)
    for begin in range(0, len(tasks), GROUP):
        part = tasks[begin : begin + GROUP]
        asked = []
        for _, task in part:
            views = answering.views(task, votes, 0, False, symmetries=True, colours=True, pair_order=True)
            asked.append(answering.questions(task, views, asking, tokenizer))
        flat = [question for questions in asked for question in questions]
        answers = answering.complete(model, tokenizer, flat, as_encoder(asking.encoder), how)
        for (family, task), questions in zip(part, asked, strict=True):
            samples = []
            for question in questions:
                for answer in next(answers):
                    assert question.request is not None  # a question without one has no answers
                    text = tokenizer.decode(answer.tokens)
                    samples.append(arc.ask.read(question.request, arc.Completion(text, answer.log_prob)))
            yield from (_mark(family, task, test, samples) for test in range(len(task.test)))
            advance(1)


def _mark(family: str, task: arc.Task, test: int, samples: Sequence[arc.Sample]) -> Mark:
    mine = [sample for sample in samples if sample.test == test]
    plain = [sample.grid for sample in mine if str(sample.augmentation) == "identity"]
    chosen = [candidate.grid for candidate in arc.vote.by_count(mine)]
    truth = task.test[test].output
    return Mark(family, _right(plain, truth), _right(chosen, truth), bool(mine))


def _right(grids: Sequence[arc.Grid | None], truth: arc.Grid | None) -> bool:
    return bool(grids) and grids[0] is not None and truth is not None and np.array_equal(grids[0], truth)


def without_a_model(tasks: Sequence[tuple[str, arc.Task]]) -> dict[str, dict[str, float]]:
    """Of each family, the share that two answers get right which need no model.

    "copy": the test input; "constant": the grid that is the answer most often in the other tasks of the family.
    """
    copied: dict[str, list[bool]] = {}
    answers: dict[str, list[str]] = {}
    for family, task in tasks:
        for pair in task.test:
            assert pair.output is not None  # tasks without answers are not examined
            copied.setdefault(family, []).append(np.array_equal(pair.input, pair.output))
            answers.setdefault(family, []).append(str(pair.output.tolist()))
    return {
        "copy": {family: float(np.mean(each)) for family, each in copied.items()},
        "constant": {family: float(np.mean(_guessed(each))) for family, each in answers.items()},
    }


def _guessed(answers: list[str]) -> list[bool]:
    """Whether each answer is the commonest of the others."""
    counts, right = Counter(answers), []
    for answer in answers:
        others = counts - Counter([answer])
        right.append(bool(others) and others.most_common(1)[0][0] == answer)
    return right


def rates(marks: Sequence[Mark], field: str) -> dict[str, float]:
    """The share of each family's test inputs that are right."""
    families = dict.fromkeys(mark.family for mark in marks)
    return {name: float(np.mean([getattr(m, field) for m in marks if m.family == name])) for name in families}


def asking_of(model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, encoder: str, prompt: str, room: int) -> arc.Asking:
    """Prompts that leave `room` tokens for an answer."""
    return prompts.asking(tokenizer, budget=model.config.max_seq + 1 - room, encoder=encoder, format=prompt)
