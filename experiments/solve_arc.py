"""Let a model solve ARC tasks: predictions under augmentations, a choice among them, a submission, its score.

Without flags: the embedded demo model on ten tasks of ARC-AGI-1. `--model Qwen/Qwen2.5-0.5B-Instruct` loads a real one.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import arc
import qwen_eqx
import sae
from qwen_lab import (
    answering,
    bounds,
    cli,
    files,
    flags,
    locks,
    meshes,
    places,
    predictions,
    prompts,
    provenance,
    rows,
    solve_report,
    stopping,
    wording,
    writing,
)
from qwen_lab.answering import Answer, How, Question
from qwen_lab.bounds import Count, CountOrNone, Seed, Whole
from qwen_lab.choosing import Choice, Positions
from qwen_lab.errors import InputError
from qwen_lab.predictions import RESCORED, Line
from sae.data.plan import PLACES

FREE = ("out", "mesh", "report_tasks")  # what a run may be gone on with differently; so may `select`, but for rescoring
Answered = list[tuple[Question, list[Answer]]]
RESCORED_MOST = 8  # candidates of one test input that are scored again, the most frequent


@dataclasses.dataclass(frozen=True)
class Config(meshes.OnMesh):
    model: str = wording.MODEL
    """Embedded name, directory in Hugging Face's layout, or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tasks: str = wording.AUTO
    """Data set (arc-agi-1|2/training|evaluation, procedural), directory of {id}.json, Kaggle challenges file, or JSONL.
    auto: the procedural tasks that the model was trained for, or arc-agi-1/training."""
    solutions: str | None = None
    """Kaggle solutions file, where it does not lie beside the challenges."""
    limit: CountOrNone = 10
    """Tasks to take, from the first; None takes all."""
    predictions_per_task: Count = 8
    """Completions of every test input, each under an augmentation of its own; the first is the task as it stands."""
    how: Literal["greedy", "sampled", "threshold"] = "greedy"
    """`threshold` finds every completion of at least that probability, under each augmentation."""
    temperature: float = 0.8
    """Of `--how sampled`."""
    top_p: float = 0.95
    """Of `--how sampled`: the least probable tokens are left out, 1 - p of the probability together."""
    threshold: float = 0.1
    """Of `--how threshold`: 1/p sequences are held at once."""
    select: Literal["count", "class", "log_prob", "rescore"] = "count"
    """Which answers to submit: the most frequent, by vote of symmetries, the most probable, or by product of experts."""
    symmetries: bool = True
    """Augment by the eight symmetries of the square."""
    colours: bool = True
    """Augment by permuting the colours 1 to 9."""
    pair_order: bool = True
    """Augment by shuffling the training pairs."""
    max_new_tokens: Count = 64
    """Tokens to generate at most. Answers in Qwen tokens have 179 on average and 1,022 at most: a real run wants 1,100."""
    max_prompt: flags.MaxPrompt = None
    """Prompt tokens at most: whole training pairs are left out to fit; None: what the model holds."""
    slots: Count = 8
    """Sequences generated together; a slot is refilled when its sequence ends."""
    tasks_together: Count = 1
    """Tasks that share the slots: more of them leave fewer slots idle, and are begun anew together after a cut."""
    capture: bool = False
    """Keep activations as a store in OUT/activations (not of a search)."""
    layers: flags.Blocks = "late"
    """Residual stream after these blocks: `10:24`, `3,5,7`, `all`, or `late` for the last three fifths. For --capture."""
    positions: Positions = "all"
    """Positions that become rows: all, those whose logits chose (or are to choose) a token of the answer, the prompt's, or
    those that stand in a cell of any grid or of the test input. For --capture."""
    items_per_shard: Count = 8
    """Items in one shard file. An item is a completion. For --capture."""
    encoder: str = wording.AUTO
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal)). auto: as trained."""
    prompt: str = wording.AUTO
    """Prompt format: a name of arc.PROMPTS. auto: as trained."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, cache and activations."""
    seed: Seed = 0
    """Of the run. Augmentations and samples are drawn from it."""
    report_tasks: Whole = 200
    """Tasks that the report shows in pictures."""
    out: Path = Path("runs/solve")
    """Directory of what is written. A run that was cut off, or is given a higher --limit, goes on where it stopped."""


def main(config: Config) -> None:
    check(config)
    model, tokenizer = config.open_model(config.model, config.dtype, config.revision)
    config = wording.filled(config, tokenizer)
    tasks = list(itertools.islice(arc.iter_tasks(config.tasks, solutions=config.solutions), config.limit))
    if not tasks:
        raise InputError(f"--tasks {config.tasks}: found no tasks, expected at least one")
    cli.say_what_a_demo_is(config.model)
    with locks.claimed(config.out):
        run = Run(config, model, tokenizer, tasks)
        if run.file.done:
            cli.console.print(f"going on after {len(run.file.done)} of {len(tasks)} tasks")
        provenance.record_run(config.out, config)
        run.generate()
        finish(run)


def check(config: Config) -> None:
    """Raises for flags that no run can have."""
    bounds.check(config)
    for name in ("temperature", "top_p", "threshold"):
        value, most = getattr(config, name), float("inf") if name == "temperature" else 1.0
        if not 0 < value <= most:
            rule = "a number above 0" if name == "temperature" else "a probability above 0 and at most 1"
            raise InputError(f"--{name.replace('_', '-')}: found {value}, expected {rule}")
    if config.capture and config.how == "threshold":
        raise InputError("--capture: found --how threshold, expected greedy or sampled: a search keeps none")


class Run:
    """A model, its tasks, and how far they have come."""

    def __init__(self, config: Config, model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, tasks: Sequence[arc.Task]):
        self.config, self.model, self.tokenizer, self.tasks = config, model, tokenizer, tasks
        self.encoder = arc.encode.as_encoder(config.encoder)
        self.begun = arc.prefill(config.encoder, config.prompt)
        room = model.config.max_seq - config.max_new_tokens
        budget = min(room, config.max_prompt or room)
        self.asking = prompts.asking(tokenizer, budget=budget, encoder=config.encoder, format=config.prompt)
        capture = None
        if config.capture:
            layers = places.parse_layers(config.layers, model.config.layers)
            capture = qwen_eqx.Capture(
                layers=layers, positions="generated" if config.positions == "generated" else "all"
            )
        filters = (qwen_eqx.Temperature(config.temperature), qwen_eqx.TopP(config.top_p))
        sampler = qwen_eqx.Chain(*filters) if config.how == "sampled" else qwen_eqx.Greedy()
        self.how = How(
            config.how,
            sampler,
            config.threshold,
            config.max_new_tokens,
            config.slots,
            config.seed,
            capture,
            Choice(config.positions),
        )
        files.expect_files(config.out, "run.json", "resume.json", "submission.json", "scores.json", "report.html")
        predictions.same_run(config.out, settled(config) | self.facts(), self.tasks_digest)
        sizes = [len(task.test) * config.predictions_per_task for task in tasks]
        self.firsts = [sum(sizes[:index]) for index in range(len(tasks) + 1)]  # items before each task
        self.file = predictions.File(config.out / "predictions.jsonl", tasks)
        self.shards = None if capture is None else writing.Shards(self.store(capture))
        if self.shards is not None:
            stored = self.shards.committed_items
            self.file.keep(max(index for index, first in enumerate(self.firsts) if first <= stored))
        self.file.keep(len(self.file.done))
        self.tokens, self.seconds = 0, 0.0

    def facts(self) -> dict[str, Any]:
        """What results depend on beside the flags and the tasks."""
        return {
            "model_config": files.digest(dataclasses.asdict(self.model.config)),
            "tokenizer": self.tokenizer.digest,
        }

    def tasks_digest(self, limit: int | None) -> str:
        return files.digest([[task.id, task.to_dict()] for task in self.tasks[:limit]])

    def store(self, capture: qwen_eqx.Capture) -> sae.StoreWriter:
        config = self.config
        plan = sae.Plan(self.firsts[-1], config.items_per_shard)
        origin = rows.Origin(config.model, config.revision, config.dtype, config.seed, settled(config), PLACES)
        manifest = rows.manifest(self.model, self.tokenizer, capture, plan, origin)
        return rows.writer(config.out / "activations", manifest)

    def generate(self) -> None:
        """Every task that is not done, `tasks_together` at a time, a line of the file per completion."""
        together = self.config.tasks_together
        solved, known = predictions.Tally(self.choose), len(list(filter(predictions.has_answers, self.tasks)))
        for task, lines in zip(self.tasks, self.file.done, strict=False):
            solved.add(task, lines)
        done = len(self.file.done)
        with cli.bar(len(self.tasks), "solve", "tasks") as advance:
            advance(done, solved.note(known))
            # a group is always begun whole, so that what a slot sees does not depend on where a run was cut off
            for begin in range(done // together * together, len(self.tasks), together):
                numbers = range(begin, min(begin + together, len(self.tasks)))
                for number, lines in self.group(numbers):
                    if number >= done:
                        self.file.append(lines)
                        solved.add(self.tasks[number], lines)
                        speed = f", {self.tokens / self.seconds:,.0f} tok/s " if self.seconds else ""
                        advance(1, solved.note(known) + speed)

    def group(self, numbers: range):
        """(task's number, its lines) of tasks that share the slots."""
        asked = {number: self.questions(self.tasks[number]) for number in numbers}
        every = [question for questions in asked.values() for question in questions]
        begin = time.perf_counter()
        first = self.firsts[numbers.start]
        answers = answering.complete(self.model, self.tokenizer, every, self.encoder, self.how, first)
        for number, questions in asked.items():
            answered = []
            for question in questions:
                stopping.check()
                answered.append((question, next(answers)))
            self.tokens += sum(len(answer.tokens) for _, several in answered for answer in several)
            self.seconds += time.perf_counter() - begin
            yield number, self.lines(self.tasks[number], answered, self.firsts[number])
            begin = time.perf_counter()

    def questions(self, task: arc.Task) -> list[Question]:
        c = self.config
        asked = answering.views(
            task, c.predictions_per_task, c.seed, c.how == "sampled",
            symmetries=c.symmetries, colours=c.colours, pair_order=c.pair_order,
        )  # fmt: skip
        return answering.questions(task, asked, self.asking, self.tokenizer)

    def choose(self, task: arc.Task, lines: Sequence[Line]) -> list[list[arc.vote.Candidate]]:
        return predictions.choose(task, lines, self.config.encoder, self.begun, self.config.select)

    def lines(self, task: arc.Task, answered: Answered, first: int) -> list[Line]:
        """What is written of a task; captured rows go to their shard."""
        lines, samples = [], []
        for item, (question, several) in enumerate(answered, first):
            for answer in several or [None]:
                fields, sample = predictions.line(question, answer, self.tokenizer)
                lines.append(fields)
                samples += [] if sample is None else [sample]
                if self.shards is not None:
                    kept = None if answer is None else answer.rows
                    kept = sae.Rows.none(self.shards.writer.manifest) if kept is None else kept
                    self.shards.add(item, kept, {**fields, "text": fields["text"] or ""})
        if self.config.select == RESCORED:
            self.rescore(task, answered, lines, samples)
        return lines

    def rescore(self, task: arc.Task, answered: Answered, lines: list[Line], samples: Sequence[arc.Sample]) -> None:
        """Adds to each line the score of its grid: its log-probability as the answer, summed over the augmentations."""
        score = answering.scorer(self.model, self.tokenizer)
        for test in range(len(task.test)):
            candidates = arc.vote.by_count(s for s in samples if s.test == test)[:RESCORED_MOST]
            fits = [question.view for question, _ in answered if question.request is not None and question.test == test]
            views = list(dict.fromkeys(fits))
            scored = arc.vote.rescore(candidates, task, test, score, views, self.asking)
            scores = {json.dumps(candidate.grid.tolist()): candidate.score for candidate in scored}
            for fields in lines:
                if fields["test"] == test and fields["text"] is not None:
                    fields["score"] = scores.get(json.dumps(fields["grid"]))


def settled(config: Config) -> dict[str, Any]:
    """The flags that must agree for a run to go on."""
    kept = {name: value for name, value in files.jsonable(config).items() if name not in FREE}
    kept["max_prompt_tokens"] = kept.pop("max_prompt")  # as files of earlier runs call it
    return kept | {"select": RESCORED if config.select == RESCORED else "any but rescore"}


def finish(run: Run) -> None:
    """Chooses, writes the submission and the report, and says how good it is where the answers are known."""
    config, tasks, done = run.config, run.tasks, run.file.done
    chosen = {task.id: run.choose(task, lines) for task, lines in zip(tasks, done, strict=True)}
    grids = {key: [[c.grid for c in ranked] for ranked in tests] for key, tests in chosen.items()}
    made = arc.submission.write(config.out / "submission.json", grids, tasks)
    known = list(filter(predictions.has_answers, tasks))
    report = None
    if known:
        samples = [s for lines in done for s in predictions.samples_of(lines, config.encoder, run.begun)]
        report = arc.evaluate(samples, made, known)
        files.write_json(config.out / "scores.json", dataclasses.asdict(report))
        cli.console.print(str(report), markup=False)
    else:
        cli.console.print("no answers are known for these tasks: nothing to score")
    page = solve_report.page(f"{config.model} on {config.tasks}", tasks, chosen, done, report, config.report_tasks)
    files.write_text(config.out / "report.html", page)
    cli.console.print(f"wrote submission.json, predictions.jsonl and report.html in {config.out}")
    if config.capture:
        store = sae.ActivationStore.open(config.out / "activations")
        store.verify()
        cli.console.print(f"wrote {len(store):,} rows x {len(store.sites)} sites of activations in {store.directory}")
        cli.console.print(f"next: python experiments/train_sae.py --source store --store {store.directory}")
    else:
        cli.console.print(f"next: look at {config.out / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, Config)
