"""Tasks as documents to learn from: tokens, what each weighs in the loss, and which of them are the answer."""

import contextlib
import dataclasses
import multiprocessing
import signal
from collections.abc import Generator, Iterator
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

WINDOW = 8  # steps whose documents are sorted by length before they are dealt to the steps
WIDTHS = 9  # of batches, at most: each is compiled
AHEAD = 4  # windows that are made while the device trains
TRIES = 100


@dataclasses.dataclass(frozen=True)
class Course:
    """Which tasks are learned from and how they are written; document n is a function of (seed, n) alone."""

    tokenizer: str
    """Model directory or name."""
    families: tuple[str, ...]
    """One that is named twice is drawn twice as often."""
    sides: tuple[int, int]
    encoder: str
    format: str
    context: int
    """Tokens of a document at most; what is longer is drawn anew."""
    seed: int
    turned: float
    """Share of the tasks that are turned or mirrored; the colours of all are permuted."""
    small: float
    """Share of the tasks whose largest side is drawn anew from the sides, so that small grids are frequent."""
    tasks: str
    """Data set that some documents are drawn from, with whole tasks that fit the context."""
    tasks_share: float
    """Share of the documents that are; 0 reads no data set."""
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
        offered = asked(course.tasks) if course.tasks_share else []
        self.offered = len(offered)
        self.fitting = [task for task in offered if self._fits(task)]
        """Those of the data set that are drawn, each with one test input."""
        if course.tasks_share and not self.fitting:
            raise InputError(
                f"--tasks: found {course.tasks} with {self.offered} answered test inputs, none within "
                f"{course.context} tokens, expected some or a longer --context-length"
            )

    def _fits(self, task: arc.Task) -> bool:
        """However it is turned: rows and columns need not be of one length."""
        views = (arc.augment.Augmentation(name).apply(task) for name in ("identity", "transpose"))
        return all(len(self.write(view).tokens) <= self.course.context for view in views)

    def task(self, number: int, attempt: int = 0) -> arc.Task:
        """Task `number` of the course, with its colours permuted and perhaps turned."""
        rng = np.random.default_rng([self.course.seed, number, attempt])
        if self._from_data(number):
            task = self.fitting[rng.integers(len(self.fitting))]
            return self._augmented(task, rng, pairs=len(task.train))
        family = self.course.families[rng.integers(len(self.course.families))]
        seed, (low, high) = int(rng.integers(HELD_OUT_SEEDS, 2**62)), self.course.sides
        if rng.random() < self.course.small:
            high = int(rng.integers(min(low + 1, high), high + 1))
        task = arc.generators.make_task(family, seed, sides=(low, high))
        return self._augmented(task, rng)

    def _from_data(self, number: int) -> bool:
        if not self.course.tasks_share:
            return False
        # no attempt has this number: what does not fit is drawn anew from where it came from
        rng = np.random.default_rng([self.course.seed, number, TRIES])
        return bool(rng.random() < self.course.tasks_share)

    def _augmented(self, task: arc.Task, rng: np.random.Generator, pairs: int = 0) -> arc.Task:
        """Colours permuted, perhaps turned, and the order of that many training pairs drawn."""
        return arc.augment.sample(rng, pairs=pairs, symmetries=bool(rng.random() < self.course.turned)).apply(task)

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
        """Lessons as the rows of a batch, as wide as the longest needs: one of `WIDTHS` widths up to the context."""
        longest, each = max(len(lesson.tokens) for lesson in lessons), -(-self.course.context // WIDTHS)
        shape = (len(lessons), min(-(-longest // each) * each, self.course.context))
        tokens: Int32[np.ndarray, "batch seq"] = np.full(shape, self.tokenizer.pad_id, np.int32)
        weights, answer = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for row, lesson in enumerate(lessons):
            size = len(lesson.tokens)
            tokens[row, :size], weights[row, :size], answer[row, :size] = lesson.tokens, lesson.weights, lesson.answer
        return Batch(tokens, weights, answer)

    def window(self, number: int, size: tuple[int, int]) -> list[Batch]:
        """The batches of `WINDOW` steps, each [accumulate, batch, seq]: documents of like length share a step.

        Steps stand in random order; which documents a window holds does not depend on their lengths.
        """
        each = int(np.prod(size))
        first = number * WINDOW * each
        lessons = sorted((self.lesson(first + n) for n in range(WINDOW * each)), key=lambda lesson: len(lesson.tokens))
        order = np.random.default_rng([self.course.seed, number]).permutation(WINDOW)
        flat = [self.padded(lessons[place * each : (place + 1) * each]) for place in order]
        return [Batch(*(leaf.reshape(*size, -1) for leaf in (b.tokens, b.weights, b.answer))) for b in flat]


def asked(source: str) -> list[arc.Task]:
    """The tasks of a data set to learn from, one for each test input with a known answer."""
    if arc.generators.sides_of(source) is not None:
        raise InputError(f"--tasks: found {source}, expected another data set: those tasks are for measuring")
    tasks = arc.load_tasks(source)
    return [dataclasses.replace(task, test=(pair,)) for task in tasks for pair in task.test if pair.output is not None]


def batches(
    course: Course, step: int, steps: int, size: tuple[int, int], at_once: int, workers: int
) -> Iterator[Batch]:
    """The batches of steps `step` to `steps`, `size` = (accumulate, batch) documents to a step.

    A call takes consecutive steps of one width, and ends with every step that is a multiple of `at_once`:
    [steps, accumulate, batch, seq].
    """
    waiting: list[Batch] = []
    with contextlib.closing(_each(course, step, steps, size, workers)) as each:
        for number, batch in enumerate(each, step + 1):
            if waiting and waiting[0].tokens.shape != batch.tokens.shape:
                yield _stacked(waiting)
                waiting = []
            waiting.append(batch)
            if number % at_once == 0:
                yield _stacked(waiting)
                waiting = []
    if waiting:
        yield _stacked(waiting)


def _stacked(steps: list[Batch]) -> Batch:
    return Batch(*(np.stack([getattr(step, name) for step in steps]) for name in ("tokens", "weights", "answer")))


def _each(course: Course, step: int, steps: int, size: tuple[int, int], workers: int) -> Generator[Batch]:
    """The batch of each step, made in `workers` processes beside, a few windows ahead; 0 makes them here."""
    places = range(step // WINDOW, -(-steps // WINDOW))
    made = _beside(course, places, size, workers) if workers else _here(Teacher(course), places, size)
    with contextlib.closing(made):
        for place, window in zip(places, made, strict=True):
            first = place * WINDOW
            yield from window[max(0, step - first) : steps - first]


def _here(teacher: Teacher, places: range, size: tuple[int, int]) -> Generator[list[Batch]]:
    for place in places:
        yield teacher.window(place, size)


def _beside(course: Course, places: range, size: tuple[int, int], workers: int) -> Generator[list[Batch]]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with XLA's threads may hang
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(course,)) as pool:
        waiting: list[Future[list[Batch]]] = []
        try:
            for place in places:
                waiting.append(pool.submit(_make, place, size))
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


def _make(place: int, size: tuple[int, int]) -> list[Batch]:
    return _TEACHERS[0].window(place, size)


def families(names: tuple[str, ...], held_out: tuple[str, ...]) -> tuple[str, ...]:
    """The families to train on: those named, or all but the held-out ones."""
    for name in (*names, *held_out):
        if name not in FAMILIES:
            raise InputError(f"--families: found {name!r}, expected one of {', '.join(FAMILIES)}")
    kept = tuple(name for name in names or tuple(FAMILIES) if name not in held_out)
    if not kept:
        raise InputError("--held-out-families: found every family, expected some left to train on")
    return kept
