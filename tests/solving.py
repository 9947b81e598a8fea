"""Helpers of the solving tests: made-up tasks, small runs over them, a model that knows the answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import arc
from qwen_lab.answering import Answer
from solve_arc import Config, main

RIGHT = -1.0  # log-probability of each token of the oracle's


def made_task(name: str, tests: int = 1, answers: bool = True) -> arc.Task:
    """Small grids, so that prompts are short; the answer is the input with 3 for 0."""
    rng = np.random.default_rng(len(name) + ord(name[-1]))
    pairs = []
    for _ in range(2 + tests):
        grid = rng.integers(0, 3, (2, 3)).astype(np.uint8)
        pairs.append(arc.Pair(grid, np.where(grid == 0, 3, grid).astype(np.uint8)))
    asked = tuple(pair if answers else arc.Pair(pair.input, None) for pair in pairs[2:])
    return arc.Task(name, tuple(pairs[:2]), asked)


def write_tasks(where: Path) -> str:
    """Three tasks as a directory of {id}.json."""
    (where / "tasks").mkdir()
    for task in (made_task("a"), made_task("b", tests=2), made_task("c")):
        (where / "tasks" / f"{task.id}.json").write_text(json.dumps(task.to_dict()))
    return str(where / "tasks")


def small(source: str, out: Path, **flags) -> Config:
    usual = {"predictions_per_task": 3, "max_new_tokens": 6, "slots": 2, "dtype": "float32", "items_per_shard": 4}
    return Config(tasks=source, out=out, prompt="compact", encoder="shape(minimal)", **(usual | flags))


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def oracle(wrong: int = 0):
    """A model that knows: answers as text, but for one cell of the first `wrong` of a task's answers."""

    def complete(model, tokenizer, asked, encoder, how, first=0) -> Iterator[list[Answer]]:
        for number, question in enumerate(asked):
            truth = question.task.test[question.test].output
            assert truth is not None
            if number < wrong:
                truth = truth.copy()
                truth[0, 0] = (truth[0, 0] + 1) % 10
            text = arc.prompt.answer(question.view.apply_grid(truth), encoder, "compact")
            tokens = tokenizer.encode(text.removeprefix(question.request.prompt.begun))
            yield [Answer(np.asarray(tokens, np.int32), RIGHT * len(tokens))]

    return complete


def run(source, out, **flags) -> dict[str, bytes]:
    """What a run leaves: predictions, submission and, if it captures, shards."""
    main(small(source, out, **flags))
    names = ["predictions.jsonl", "submission.json"]
    names += [str(path.relative_to(out)) for path in sorted(out.glob("activations/**/*")) if path.is_file()]
    return {name: (out / name).read_bytes() for name in names}
