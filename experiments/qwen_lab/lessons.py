"""Tasks as documents to learn from: tokens, what each weighs in the loss, and which of them are the answer."""

import dataclasses
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32

import arc
import qwen_eqx
from arc.encode import as_encoder
from arc.generators import FAMILIES, HELD_OUT_SEEDS
from qwen_eqx.training import Batch
from qwen_eqx.weights import hub
from qwen_lab import prompts
from qwen_lab.errors import InputError, RunError

AHEAD = 4  # calls that are made while the device trains
TRIES = 100


@dataclasses.dataclass(frozen=True)
class Course:
    """Which tasks are learned from and how they are written; document n is a function of (seed, n) alone."""

    tokenizer: str
    """Model directory or name."""
    families: tuple[str, ...]
    sides: tuple[int, int]
    encoder: str
    format: str
    context: int
    """Tokens of a document at most; what is longer is drawn anew."""
    seed: int
    turned: float
    """Share of the tasks that are turned or mirrored; the colours of all are permuted."""
    learn: Literal["answer", "outputs", "all"]
    """Which tokens weigh in the loss: the test's output, all outputs, or everything."""


@dataclasses.dataclass(frozen=True)
class Lesson:
    """One document."""

    tokens: list[int]
    weights: Float32[np.ndarray, " seq"]
    answer: Bool[np.ndarray, " seq"]


class Teacher:
    """Writes tasks as lessons, with one tokenizer."""

    def __init__(self, course: Course, tokenizer: qwen_eqx.Tokenizer | None = None):
        self.course = course
        self.tokenizer = tokenizer or qwen_eqx.Tokenizer.from_directory(hub.locate(course.tokenizer))
        self.asking = prompts.asking(
            self.tokenizer, budget=course.context, encoder=course.encoder, format=course.format
        )
        self.asking = dataclasses.replace(self.asking, count=None, budget=None)

    def task(self, number: int, attempt: int = 0) -> arc.Task:
        """Task `number` of the course, with its colours permuted and perhaps turned."""
        rng = np.random.default_rng([self.course.seed, number, attempt])
        family = self.course.families[rng.integers(len(self.course.families))]
        task = arc.generators.make_task(family, int(rng.integers(HELD_OUT_SEEDS, 2**62)), sides=self.course.sides)
        return arc.augment.sample(rng, symmetries=bool(rng.random() < self.course.turned)).apply(task)

    def lesson(self, number: int) -> Lesson:
        """Document `number` of the course."""
        for attempt in range(TRIES):
            try:
                lesson = self.write(self.task(number, attempt))
            except arc.InputError:  # no task of this family within these sides
                continue
            if len(lesson.tokens) <= self.course.context:
                return lesson
        raise InputError(f"--context-length: found {self.course.context}, expected room for a task within these sides")

    def write(self, task: arc.Task, test: int = 0) -> Lesson:
        """A task with its right answer and the end of the turn."""
        truth, encoder = task.test[test].output, as_encoder(self.course.encoder)
        if truth is None:
            raise InputError(f"task {task.id}: found no output of test {test}, expected one to learn from")
        prompt = self.asking.prompt(task, test)
        begin = len(prompt.text) - len(encoder.opening)
        text = prompt.text[:begin] + encoder.encode(truth)
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        spans = [(begin, len(text))]
        if self.course.learn == "outputs":
            # with the token behind each: it says that the grid ends
            placed = [grid for grid in prompt.grids or () if grid.part == "output"]
            spans += [(grid.start, grid.start + len(encoder.encode(grid.grid)) + 1) for grid in placed]
        elif self.course.learn == "all":
            spans += [(1, begin)]
        weights = np.asarray([any(a < end and b > start for start, end in spans) for a, b in offsets], np.float32)
        answer = np.asarray([b > begin for _, b in offsets], bool)
        end = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        last = np.ones(len(end))
        return Lesson(
            [*ids, *end],
            np.concatenate([weights, last.astype(np.float32)]),
            np.concatenate([answer, last.astype(bool)]),
        )

    def padded(self, lessons: list[Lesson]) -> Batch:
        """Lessons as the rows of a batch as wide as the context."""
        shape = (len(lessons), self.course.context)
        tokens: Int32[np.ndarray, "batch seq"] = np.full(shape, self.tokenizer.pad_id, np.int32)
        weights, answer = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for row, lesson in enumerate(lessons):
            size = len(lesson.tokens)
            tokens[row, :size], weights[row, :size], answer[row, :size] = lesson.tokens, lesson.weights, lesson.answer
        return Batch(tokens, weights, answer)

    def call(self, first: int, shape: tuple[int, int, int]) -> Batch:
        """What one compiled call trains on, [steps, accumulate, batch, seq], from document `first` on."""
        flat = self.padded([self.lesson(first + index) for index in range(int(np.prod(shape)))])
        stacked = [leaf.reshape(*shape, -1) for leaf in (flat.tokens, flat.weights, flat.answer)]
        return Batch(*stacked)


def batches(
    course: Course, step: int, steps: int, size: tuple[int, int], at_once: int, workers: int
) -> Iterator[Batch]:
    """The batches of steps `step` to `steps`, `at_once` to a call, `size` = (accumulate, batch) documents to a step.

    Made in `workers` processes beside, a few calls ahead; 0 makes them here.
    """
    starts = range(step, steps, at_once)
    calls = [(start * size[0] * size[1], (min(at_once, steps - start), *size)) for start in starts]
    if not workers:
        teacher = Teacher(course)
        yield from (teacher.call(*call) for call in calls)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with XLA's threads may hang
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(course,)) as pool:
        waiting: list[Future[Batch]] = []
        try:
            for call in calls:
                waiting.append(pool.submit(_make, *call))
                if len(waiting) > AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        except BrokenProcessPool:
            raise RunError("a process that makes tasks died; the last checkpoint is kept; run the same again") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_TEACHERS: list[Teacher] = []


def _begin(course: Course) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process that trains saves and ends this one
    _TEACHERS[:] = [Teacher(course)]


def _make(first: int, shape: tuple[int, int, int]) -> Batch:
    return _TEACHERS[0].call(first, shape)


def families(names: tuple[str, ...], held_out: tuple[str, ...]) -> tuple[str, ...]:
    """The families to train on: those named, or all but the held-out ones."""
    for name in (*names, *held_out):
        if name not in FAMILIES:
            raise InputError(f"--families: found {name!r}, expected one of {', '.join(FAMILIES)}")
    kept = tuple(name for name in names or tuple(FAMILIES) if name not in held_out)
    if not kept:
        raise InputError("--held-out-families: found every family, expected some left to train on")
    return kept
