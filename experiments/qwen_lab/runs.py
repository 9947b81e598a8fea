"""One training run: from the last checkpoint, through a shuffle buffer, to dictionaries measured on held-out tasks."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import sae
from qwen_eqx.model.room import free_device_bytes
from qwen_lab import evaluation, extending, files, joining, provenance, sources, stopping, tracking
from qwen_lab.errors import InputError, RunError
from qwen_lab.places import Dictionary
from qwen_lab.seen import Seen
from qwen_lab.settings import EARLIER, RAISABLE, RunConfig, form_of, k_of, settled, training_flags
from qwen_lab.sweeps import Member
from sae import training
from sae.data import buffer
from sae.evaluation import metrics
from sae.training import checkpoint, sharding

Index = int | list[int]
Advance = Callable[[int, str], None]
"""Called with the steps just taken and a note on them."""


def checkpoints(config: RunConfig) -> Path:
    """Where a run keeps them."""
    return config.out / "checkpoints"


def quiet(steps: int, note: str) -> None:
    """Shows nothing."""


def train_config(config: RunConfig) -> training.TrainConfig:
    form = form_of(config)
    return training.TrainConfig(
        steps=config.steps,
        learning_rate=config.lr,
        warmup_steps=config.steps // 20,
        decay_steps=config.steps // 5,
        sparsity=form.sparsity if config.sparsity is None else config.sparsity,
        sparsity_warmup_steps=config.steps // 5,
        target_l0=float(k_of(config)) if form.targets_l0 else 0.0,
        dead_after=config.dead_after,
        bias_rate=config.bias_rate,
        product_dtype=config.product_dtype,
    )


def make_module(member: Member, largest_k: int, d_model: int) -> sae.AbstractDictionary:
    """A fresh dictionary; forms that keep k latents have room for the sweep's largest k, and `Hyper` lowers it."""
    config, form = member.config, form_of(member.config)
    sizes: dict[str, Any] = {"d_model": d_model, "d_sae": config.d_sae, "key": jax.random.key(config.seed)}
    if form.several_sites:
        sizes["sites"] = len(member.place.reads)
    elif member.place.transcodes:
        sizes["d_out"] = d_model
    if "k" in form.details:
        sizes["k"] = largest_k
    return form.init(**sizes, **form.short_start)


def check_memory(config: RunConfig, members: int, source: sources.Source, mesh: Mesh | None) -> None:
    """Raises before anything is allocated that cannot be: weights with gradients and Adam's two means, and the buffer."""
    free = free_device_bytes(None if mesh is None else mesh.local_devices)
    rows_over, latents_over = (1, 1) if mesh is None else mesh.devices.shape
    width = source.d_model * (len(source.sites) if form_of(config).several_sites else 1)
    weights = members * 2 * config.d_sae * width * 4 // latents_over  # encoder and decoder, float32
    rows = config.buffer_rows * len(source.sites) * source.d_model * source.dtype.itemsize // rows_over
    if free is not None and 4 * weights + rows > free:
        name = "--buffer-rows" if rows > 4 * weights else "--d-sae"
        sizes = f"dictionaries {weights:,} bytes, their gradients and optimizer {3 * weights:,}, buffer {rows:,}"
        raise InputError(f"memory: found {sizes}, expected at most {free:,} free bytes; lower {name}")


def _indices(member: Member, sites: tuple[str, ...]) -> tuple[Index, Index]:
    """Where in `sites` a member reads and writes: a number, or one for each of several sites."""
    reads, writes = ([sites.index(site) for site in each] for each in (member.place.reads, member.place.writes))
    return (reads, writes) if form_of(member.config).several_sites else (reads[0], writes[0])


@dataclasses.dataclass(frozen=True)
class Result:
    """A trained dictionary, the directory it is saved in, and its metrics on the held-out tasks."""

    dictionary: Dictionary
    saved: Path
    metrics: dict[str, Any]


class Run:
    """Training from the last checkpoint, if there is one, to the last step: `start`, `proceed`, `finish`."""

    def __init__(self, config: RunConfig, members: list[Member], source: sources.Source, mesh: Mesh | None = None):
        need = 2 * (config.batch_size * config.steps_per_call + source.largest)
        if config.buffer_rows < need:
            raise InputError(
                f"--buffer-rows: found {config.buffer_rows}, expected at least {need}: twice a call's rows and a group's"
            )
        check_memory(config, len(members), source, mesh)
        self.config, self.members, self.source, self.mesh = config, members, source, mesh
        self.sites = [_indices(member, source.sites) for member in members]
        self.state, self.rows = self._blank(jnp.zeros((2, len(source.sites), source.d_model), jnp.float32))
        # an L0 that is asked for is set on the last of the training tasks, of which no row is trained on
        kept_back = -(-source.training // 5) if form_of(config).targets_l0 and source.training > 1 else 0
        self.training = source.training - kept_back
        self.step, self.next_group, self.fresh = 0, 0, True
        self.saved = -1  # the step of the last checkpoint
        self.calls = 0  # of this process, by which several agree on where they stop
        self.history: list[dict[str, Any]] = []
        self.feed = "store" if config.source == "store" else "model"  # what is waited for when rows are
        self.seconds = {self.feed: 0.0, "buffer": 0.0, "SAE": 0.0}
        self.stopping = False
        self.log: tracking.Log | None = None  # the first process keeps it

    @classmethod
    def start(cls, config: RunConfig, members: list[Member], source: sources.Source, mesh: Mesh | None = None) -> "Run":
        """A run in `config.out`: a new one, or the one that was cut off there; raises if another one stands there."""
        run = cls(config, members, source, mesh)
        files.fresh_directory(config.out)
        files.expect_files(config.out, "run.json", "metrics.json", tracking.METRICS, "loss.svg")
        if run.directory.exists() and not run.directory.is_dir():
            raise InputError(f"{run.directory}: found a file, expected a directory of checkpoints")
        if checkpoint.steps(run.directory):
            (run.state, run.rows), cursor, run.step = checkpoint.load(run.directory, (run.state, run.rows))
            run.saved = run.step
            run._check_whole(cursor)
            run._check_same(cursor["config"])
            source.seen.check(cursor.get("data", Seen().said), source.flags)  # earlier versions kept none
            run.next_group, run.history, run.fresh = cursor["next_group"], cursor["history"], False
        if joining.first():
            provenance.record_run(config.out, config)
        return run

    @property
    def directory(self) -> Path:
        return checkpoints(self.config)

    def proceed(self, advance: Advance = quiet) -> None:
        """Until the last step; a signal or `stop` ends it earlier, saved: Stopped, or KeyboardInterrupt after Ctrl-C."""
        names = [member.name for member in self.members]
        with stopping.held(), ExitStack() as opened:
            if joining.first():
                log = tracking.Log(self.config.out, self.config.track, self.config, self.history, names)
                self.log = opened.enter_context(log)
            if self.fresh:
                self._fill()
                if self._asked():  # before the first step there is nothing to save
                    self._give_up()
                self.state, _ = self._blank(self.rows.rows[: int(self.rows.size)])
            try:
                self._loop(advance)
            except training.NotFinite as error:
                kept = checkpoint.steps(self.directory)
                last = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint was due yet"
                raise RunError(f"{error}; {last} in {self.directory}; a lower --lr may help") from error

    def stop(self) -> None:
        """Ends `proceed` after the steps that are being taken."""
        self.stopping = True

    def _loop(self, advance: Advance) -> None:
        begin = time.perf_counter()
        spent = dict(self.seconds)
        sites = jnp.asarray(self.sites if len(self.members) > 1 else self.sites[0], jnp.int32)
        for state, measured in training.fit(self.state, self._batches(), train_config(self.config), sites=sites):
            self.state = state
            taken = measured.loss.shape[-1]
            self.step += taken
            self._remember(measured)
            feeding = sum(self.seconds[name] - spent[name] for name in (self.feed, "buffer"))
            self.seconds["SAE"] += time.perf_counter() - begin - feeding
            begin, spent = time.perf_counter(), dict(self.seconds)
            low, high = min(self.history[-1]["fvu"]), max(self.history[-1]["fvu"])
            advance(taken, f"fvu {low:.3f} " if low == high else f"fvu {low:.3f} to {high:.3f} ")
            if self.step == self.config.steps or self._due(taken):
                self._save()
        if self.step < self.config.steps:
            if self.saved != self.step:
                self._save()
            self._give_up()

    def _asked(self) -> bool:
        return not joining.joined() and (self.stopping or stopping.asked())  # of several processes none stops alone

    def _give_up(self) -> NoReturn:
        stopping.check()
        raise stopping.Stopped

    def _remember(self, measured: training.StepMetrics) -> None:
        """A call's means of every member; of dead latents the last count."""
        means = {name: jnp.mean(getattr(measured, name).astype(jnp.float32), -1) for name in ("loss", "fvu", "l0")}
        means["dead"] = measured.dead[..., -1]
        lists = {name: jnp.atleast_1d(values).tolist() for name, values in means.items()}
        self.history.append({"step": self.step} | lists)
        if self.log is not None:
            self.log.add(self.history[-1] | {"share_waiting": round(self._share(self.feed), 4)})

    def _due(self, taken: int) -> bool:
        every = self.config.checkpoint_every
        return self.step // every > (self.step - taken) // every

    def _batches(self) -> Iterator[jax.Array]:
        """Draws from the buffer, filling it as it empties, until the steps are done or a signal came."""
        size = self.config.batch_size
        while self.step < self.config.steps:
            self._fill()
            self.calls += 1
            # state, rows and next group agree here, so that a saved run goes on as if never stopped
            if self._asked() or joining.all_stop(self.calls):
                return
            steps = min(self.config.steps_per_call, self.config.steps - self.step)
            with self._timed("buffer"):
                self.rows, drawn = self.rows.draw(steps=steps, batch=size)
                drawn = jnp.moveaxis(drawn, 2, 1)  # steps sites batch d_model
                drawn.block_until_ready()
            yield drawn

    def _fill(self) -> None:
        """Add groups until half of the buffer stays after the next draw; nothing of them comes to the host."""
        call = self.config.batch_size * self.config.steps_per_call
        dry = 0
        while (size := int(self.rows.size)) < self.rows.capacity // 2 + call and not self._asked():
            with self._timed(self.feed):
                group = self.source.group(self.next_group % self.training)
                group.rows.block_until_ready()
            self.next_group += 1
            with self._timed("buffer"):
                keep = sources.wanted(group, self.config.sink_times)
                self.rows = self.rows.add(group.rows, keep)
            dry = dry + 1 if int(self.rows.size) == size else 0
            if dry > self.training:
                raise InputError("--sink-times: found no row left by the filter, expected some")

    def _blank(self, sample: jax.Array) -> tuple[training.TrainState, buffer.ShuffleBuffer]:
        """The state before the first step, centred and scaled by `sample`, and an empty buffer."""
        config, states = self.config, []
        largest = max(k_of(member.config) for member in self.members)
        for member, (reads, writes) in zip(self.members, self.sites, strict=True):
            settings, module = train_config(member.config), make_module(member, largest, self.source.d_model)
            module = module if self.mesh is None else training.place(module, self.mesh)
            target = sample[:, _at(writes)] if member.place.transcodes else None
            state = training.init(module, settings, sample[:, _at(reads)], target)
            numbers = training.hyper(module, settings, float(k_of(member.config)) if "k" in module.details else None)
            states.append(eqx.tree_at(lambda s: s.hyper, state, numbers))
        rows = buffer.ShuffleBuffer.init(
            capacity=config.buffer_rows,
            sites=len(self.source.sites),
            d_model=self.source.d_model,
            key=jax.random.fold_in(jax.random.key(config.seed), 1),
            dtype=self.source.dtype,
            mesh=self.mesh,
        )
        state = states[0] if len(states) == 1 else training.stack(states)
        return state if self.mesh is None else training.place(state, self.mesh), rows

    def _save(self) -> None:
        cursor = {"config": settled(self.config), "next_group": self.next_group, "history": self.history}
        cursor["data"] = self.source.seen.said
        cursor["digest"] = files.digest(cursor)
        checkpoint.save(self.directory, self.step, (self.state, self.rows), cursor, keep=2)
        self.saved = self.step

    def _check_whole(self, cursor: dict[str, Any]) -> None:
        """Raises unless the cursor is the one that was saved; what was saved before cursors had a digest is believed."""
        said = {name: value for name, value in cursor.items() if name != "digest"}
        kinds = {"config": dict, "next_group": int, "history": list} | ({"data": dict} if "data" in said else {})
        whole = all(isinstance(said.get(name), kind) for name, kind in kinds.items())
        if not whole or cursor.get("digest", files.digest(said)) != files.digest(said):
            where = self.directory / f"{self.step:08d}" / "state.json"
            raise InputError(
                f"{where}: cursor: found other values than were saved, expected those; delete that checkpoint"
            )

    def _check_same(self, old: dict[str, Any]) -> None:
        old, new = EARLIER | old, settled(self.config)
        more = {name for name in RAISABLE if extending.raised(self.config.out, name, old.get(name), new[name])}
        differences = [
            f"{name} was {old.get(name)!r} and is {new[name]!r}"
            for name in new
            if name not in more and old.get(name) != new[name]
        ]
        if differences:
            where = f"--out {self.config.out}: found the checkpoints of another run"
            raise InputError(f"{where} ({'; '.join(differences)}), expected the same config or a new directory")

    def _timed(self, what: str) -> "Stopwatch":
        return Stopwatch(self.seconds, what)

    def _share(self, what: str) -> float:
        """Of the seconds that this process has spent in the loop."""
        return self.seconds[what] / (sum(self.seconds.values()) or 1.0)

    def shares(self) -> str:
        """Where the time went."""
        parts = ", ".join(f"{name} {self._share(name):.0%} ({seconds:.1f} s)" for name, seconds in self.seconds.items())
        return f"share of the time: {parts}; compilation included"

    def finish(self, facts: dict[str, Any]) -> dict[str, Result]:
        """Saves every member and measures it on the held-out tasks; `facts` say where they were trained."""
        held_out = sources.held_out_rows(self.source, self.config.sink_times)
        kept = range(self.training, self.source.training)
        setting = sources.rows_in(self.source, kept, self.config.sink_times) if kept else None
        results = {}
        states = [self.state] if len(self.members) == 1 else training.unstack(self.state)
        for member, state, (reads, writes) in zip(self.members, states, self.sites, strict=True):
            module = sharding.here(training.finish(state))
            if setting is not None:
                module = module.at_l0(setting[:, _at(reads)], float(k_of(member.config)))
            total = evaluation.totals_of(module, held_out[:, _at(reads)], held_out[:, _at(writes)])
            where = self.config.out / "sae" / (member.name if self.config.sweep else "")
            metadata = facts | member.place.metadata | {"training": training_flags(member.config)}
            if joining.first():
                sae.save(module, where, metadata, density=metrics.density(total))
            said = {"form": self.config.form, "site": str(member.place), "saved": str(where)}
            said["rows_of"] = sources.rows_of(self.source, len(held_out))
            dictionary = Dictionary(member.name, module, member.place, metadata)
            measured = metrics.summary(total)
            sites = evaluation.by_site(dictionary, held_out[:, _at(reads)], held_out[:, _at(writes)], measured["l0"])
            results[member.name] = Result(dictionary, where, measured | said | sites)
        if joining.first():
            files.write_json(self.config.out / "metrics.json", {name: one.metrics for name, one in results.items()})
        return results


def _at(index: Index) -> Any:
    """As JAX indexes an axis: a list as an array."""
    return jnp.asarray(index, jnp.int32) if isinstance(index, list) else index


class Stopwatch:
    """Adds the time of a with block to an account."""

    def __init__(self, account: dict[str, float], what: str):
        self.account, self.what = account, what

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.account[self.what] += time.perf_counter() - self.begin
