"""One run that trains a model: from the last checkpoint to a model directory, measured on held-out tasks on the way."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

import arc
import qwen_eqx
from qwen_eqx import training
from qwen_lab import allocation, cards, cli, exactness, files, joining, lessons, provenance, stopping, tracking, wording
from qwen_lab.errors import InputError, RunError
from qwen_lab.hosts import Hosts
from qwen_lab.lm_settings import LMConfig, check, course, settled, start, train_config
from sae.training import checkpoint

Advance = Callable[..., None]
METRICS, MODEL = tracking.METRICS, "model"


def checkpoints(config: LMConfig) -> Path:
    """Where a run keeps them."""
    return config.out / "checkpoints"


@contextmanager
def shared(config: LMConfig, hosts: Hosts) -> Iterator["LMRun"]:
    """A run of several processes, which join once all have found the same code, flags, model and checkpoints."""
    check(config)
    said = joining.flags_of(config) | {"last checkpoint": checkpoint.steps(checkpoints(config))[-1:]}
    with joining.together(hosts, said | {"model": joining.files_of(config.init or config.tokenizer)}, config.out):
        cli.check_platform()
        run = LMRun(config)
        joining.expect_same("tasks", str(run.settled.get("tasks_digest")))
        yield run


class LMRun:
    """`open`, `proceed`, `finish`; making one checks the flags and writes nothing."""

    def __init__(self, config: LMConfig):
        check(config)
        self.config, self.course = config, course(config)
        self.mesh = config.open_mesh()
        self.model, self.tokenizer = start(config, self.mesh)
        allocation.keep()
        if (most := self.model.config.max_seq) < config.context_length:
            raise InputError(f"--context-length: found {config.context_length}, expected at most the model's {most}")
        self.teacher = lessons.Teacher(self.course, self.tokenizer)
        self.teacher.lesson(0)  # whether any fits the context
        self.settled = settled(config) | {"families": list(self.course.families)}  # those meant where none is named
        if config.tasks_share:
            self.settled["tasks_digest"] = files.digest([task.to_dict() for task in self.teacher.fitting])
        self.before = cards.stages_before(config)
        state = training.init(self.model, train_config(config))
        self.state = state if self.mesh is None else training.place(state, self.mesh)
        self.step, self.tokens = 0, 0
        self.calls = 0  # of this process, by which several agree on where they stop
        self.history: list[dict[str, Any]] = []
        held_out = (*dict.fromkeys(self.course.families), *config.held_out_families)
        self.tasks = list(arc.generators.held_out(config.sides, held_out, config.eval_tasks))

    def open(self) -> None:
        """Begins in the run's directory, or goes on where it was cut off there; raises if another run stands there."""
        out = self.config.out
        files.fresh_directory(out)
        files.expect_files(out, "run.json", METRICS, "loss.svg")
        if checkpoint.steps(self.directory):
            self.state, cursor, self.step = checkpoint.load(self.directory, self.state)
            self._check_same(cursor)
            self.history = cursor["history"]
        if joining.first():
            provenance.record_run(out, self.config)

    @property
    def directory(self) -> Path:
        return checkpoints(self.config)

    def proceed(self, advance: Advance) -> None:
        """To the last step; a signal ends it earlier, saved."""
        with ExitStack() as opened:
            self.log: tracking.Log | None = None  # the first process keeps it
            if joining.first():
                log = tracking.Log(self.config.out, self.config.track, self.config, self.history)
                self.log = opened.enter_context(log)
            self._loop(advance)

    def _loop(self, advance: Advance) -> None:
        config = self.config
        size = (config.accumulate, config.batch_size)
        made = lessons.batches(self.course, self.step, config.steps, size, config.steps_per_call, config.workers)
        begin = time.perf_counter()
        try:
            for state, metrics in training.fit(self.state, self._counted(made), train_config(config)):
                self.state = state
                taken = len(np.asarray(metrics.learning_rate))
                self.step += taken
                self._remember(metrics, taken, time.perf_counter() - begin)
                line = self.history[-1]
                rate = self._measured()
                advance(
                    taken, f"loss {line['loss']:.3f} exact {line['exact']:.0%} {line['tokens_per_s']:,.0f} tok/s{rate}"
                )
                if self._due(config.eval_every, taken):
                    self._measure()
                self.calls += 1
                stops = joining.stops(self.calls)
                if self._due(config.checkpoint_every, taken) or stops:
                    self._save()
                if stops and self.step < config.steps:
                    self.finish()  # what was learned so far may be used
                    stopping.check()
                    raise stopping.Stopped  # another process was told
                begin = time.perf_counter()
        except training.NotFinite as error:
            kept = checkpoint.steps(self.directory)
            last = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint was due yet"
            raise RunError(f"{error}; {last} in {self.directory}; a lower --lr may help") from error
        finally:
            made.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _counted(self, made: Iterator[training.Batch]) -> Iterator[training.Batch]:
        for batch in made:
            self.tokens = batch.tokens.size  # of the call under way, padding included
            yield batch

    def finish(self) -> dict[str, Any]:
        """Saves the model as it is now as a directory that transformers opens; returns the last measurement."""
        model = training.merge(self.state.model)
        model = joining.on_host(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model))
        low, high = self.config.sides
        said = {"encoder": self.config.encoder, "prompt": self.config.prompt, "tasks": f"procedural/{low}-{high}"}
        if joining.first():
            qwen_eqx.save_pretrained(model, wording.saying(self.tokenizer, **said), self.config.out / MODEL)
            cards.write(self.config.out / MODEL, self.config, self.history, model.config.parameters, self.before)
        return next((line for line in reversed(self.history) if "families" in line), {})

    def _due(self, every: int, taken: int) -> bool:
        return self.step == self.config.steps or self.step // every > (self.step - taken) // every

    def _remember(self, metrics: training.StepMetrics, taken: int, seconds: float) -> None:
        sums = jax.tree.map(lambda leaf: np.asarray(leaf).sum(), metrics.totals)
        line = {
            "step": self.step,
            "loss": float(sums.mean()),
            "exact": float(sums.exact_rate()),
            "gradient_norm": float(np.asarray(metrics.gradient_norm).mean()),
            "learning_rate": float(np.asarray(metrics.learning_rate)[-1]),
            "seconds": round(seconds, 3),
            "tokens_per_s": round(self.tokens / seconds, 1),
        }
        self._append(line)

    def _measure(self) -> None:
        model = training.merge(self.state.model)
        model = model if self.mesh is None else qwen_eqx.shard(model, self.mesh)
        found = exactness.rates(exactness.exact(model, self.teacher, self.tasks))
        seen = [found[family] for family in dict.fromkeys(self.course.families) if family in found]
        unseen = [found[family] for family in self.config.held_out_families if family in found]
        means = {"seen": float(np.mean(seen)), "unseen": float(np.mean(unseen)) if unseen else None}
        self._append({"step": self.step, **means, "families": found})

    def _measured(self) -> str:
        last = next((line for line in reversed(self.history) if "families" in line), None)
        return "" if last is None else f" held out {last['seen']:.0%}"

    def _append(self, line: dict[str, Any]) -> None:
        self.history.append(line)
        if self.log is not None:
            self.log.add(line)

    def _save(self) -> None:
        cursor = {"config": self.settled, "history": self.history}
        checkpoint.save(self.directory, self.step, self.state, cursor | {"digest": files.digest(cursor)}, keep=2)

    def _check_same(self, cursor: dict[str, Any]) -> None:
        said = {name: cursor.get(name) for name in ("config", "history")}
        if cursor.get("digest") != files.digest(said):
            where = self.directory / f"{self.step:08d}" / "state.json"
            raise InputError(f"{where}: cursor: found other values than were saved, expected those; delete it")
        old = settled(LMConfig()) | cursor["config"]  # an earlier version did not know every flag
        new = self.settled
        changed = [f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in new if old.get(name) != new[name]]
        if changed:
            where = f"--out {self.config.out}: found the checkpoints of another run"
            raise InputError(f"{where} ({'; '.join(changed)}), expected the same config or a new directory")
