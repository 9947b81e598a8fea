"""One training run: from the last checkpoint, through a shuffle buffer, to SAEs measured on held-out tasks."""

import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

import sae
from qwen_lab import cli, sources
from qwen_lab.places import Place
from sae import training as train
from sae.data import buffer
from sae.evaluation import metrics
from sae.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Config:
    source: Literal["live", "store"] = "live"
    """live: activations straight from the model; store: replayed from the shards of `extract.py`."""
    store: Path = Path("runs/extract")
    """Activation store, for --source store."""
    form: Literal["topk", "batchtopk", "jumprelu", "matryoshka", "gated", "relu"] = "topk"
    """Of the sparse autoencoder."""
    sweep: tuple[str, ...] = ()
    """Axes such as k=8,16,32 or layer=1,2,3 (also lr, seed, sparsity, site); all combinations train at once on one pass."""
    model: str = "tiny-arc"
    """Embedded name, directory in Hugging Face's layout, or hub id (live)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the model and of the activations (live)."""
    tasks: str = "arc-agi-1/training"
    """Data set name, directory of {id}.json, Kaggle challenges file, or JSONL (live)."""
    limit: int = 120
    """Tasks to take, from the first, held-out ones included (live)."""
    held_out: int = 20
    """Of these the last so many are never trained on; the metrics at the end are theirs."""
    layer: int | None = None
    """Residual stream after this block; without it the first of the late ones (or the store's first site)."""
    site: str | None = None
    """Any other place, as TransformerLens or Hugging Face spell it: blocks.2.hook_mlp_out."""
    target_site: str | None = None
    """Train a transcoder, which from the site above predicts this later one."""
    max_prompt: int = 1024
    """Prompt tokens at most: training pairs are left out to fit, and inputs that cannot fit are skipped (live)."""
    max_new_tokens: int = 16
    """Tokens the model writes after each prompt (live)."""
    prompts: int = 4
    """Prompts the model works on together."""
    d_sae: int = 1024
    """Latents."""
    k: int = 16
    """Latents that fire per position: exactly (topk), on average (batchtopk, matryoshka), or as the target (jumprelu)."""
    sparsity: float | None = None
    """Weight of the sparsity penalty; without it 1 for jumprelu's target and 0.05 for the L1 of relu and gated."""
    bias_rate: float | None = None
    """How fast biases and thresholds move, over --lr: higher where jumprelu's L0 stays above its target."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 512
    """Positions per step."""
    lr: float = 2e-3
    """Adam's learning rate; it warms up over a twentieth of the steps and falls to 0 over the last fifth."""
    product_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the operands of the dense products; sums are float32."""
    dead_after: int = 50_000
    """Positions without firing after which a latent counts as dead and is offered what the others leave over."""
    sink_times: float = 10.0
    """Drop positions whose norm exceeds this many medians (attention sinks); 0 keeps all."""
    buffer_rows: int = 49_152
    """Rows the shuffle buffer holds on the device."""
    steps_per_call: int = 10
    """Steps per compiled call; checkpoints and the progress bar move by as many."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last two are kept."""
    seed: int = 0
    """Of the first weights and the shuffling."""
    out: Path = Path("runs/train_sae")
    """Run directory; a run that was cut off goes on where its last checkpoint stands."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One SAE of a run, which may be a sweep."""

    name: str
    config: Config  # with its own values
    place: Place


def train_config(config: Config) -> train.TrainConfig:
    penalized = config.form in ("relu", "gated")
    default = 0.05 if penalized else 1.0
    return train.TrainConfig(
        steps=config.steps,
        learning_rate=config.lr,
        warmup_steps=config.steps // 20,
        decay_steps=config.steps // 5,
        sparsity=default if config.sparsity is None else config.sparsity,
        sparsity_warmup_steps=config.steps // 5,
        target_l0=float(config.k) if config.form == "jumprelu" else 0.0,
        dead_after=config.dead_after,
        bias_rate=config.bias_rate,
        product_dtype=config.product_dtype,
    )


def make_module(member: Member, largest_k: int, d_model: int) -> sae.AbstractDictionary:
    """A fresh SAE; forms that keep k latents have room for the sweep's largest k, and `Hyper` lowers it."""
    config = member.config
    sizes: dict[str, Any] = {"d_model": d_model, "d_sae": config.d_sae, "key": jax.random.key(config.seed)}
    if member.place.transcodes:
        sizes["d_out"] = d_model
    if config.form in ("topk", "batchtopk", "matryoshka"):
        sizes["k"] = largest_k
    if config.form == "topk":
        sizes["encoder_norm"] = 0.3  # runs are short: shorter rows leave far more latents dead (docs/LOG.md)
    return sae.FORMS[config.form].init(**sizes)


def settled(config: Config) -> dict[str, Any]:
    """What a run may not change while it goes on."""
    return {name: value for name, value in cli.jsonable(config).items() if name not in ("out", "checkpoint_every")}


class Run:
    """Training from the last checkpoint, if there is one, to the last step."""

    def __init__(self, config: Config, members: list[Member], source: sources.Source):
        self.config, self.members, self.source = config, members, source
        self.sites = [(source.sites.index(m.place.reads), source.sites.index(m.place.writes)) for m in members]
        self.state, self.rows = self._blank(jnp.zeros((2, len(source.sites), source.d_model), jnp.float32))
        self.step, self.next_group, self.fresh = 0, 0, True
        self.history: list[dict[str, Any]] = []
        self.seconds = {"model": 0.0, "buffer": 0.0, "SAE": 0.0}
        self.stopping = False

    @classmethod
    def start(cls, config: Config, members: list[Member], source: sources.Source) -> "Run":
        run = cls(config, members, source)
        if checkpoint.steps(run.directory):
            (run.state, run.rows), cursor, run.step = checkpoint.load(run.directory, (run.state, run.rows))
            run._check_same(cursor["config"])
            run.next_group, run.history, run.fresh = cursor["next_group"], cursor["history"], False
            cli.console.print(f"going on from step {run.step} of {config.steps}")
        return run

    @property
    def directory(self) -> Path:
        return self.config.out / "checkpoints"

    def proceed(self) -> None:
        """Until the last step; stops early, saved, on SIGTERM."""
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        if self.fresh:
            self._fill()
            self.state, _ = self._blank(self.rows.rows[: int(self.rows.size)])
        try:
            with cli.bar(self.config.steps, "training", "steps") as advance:
                advance(self.step)
                self._loop(advance)
        except train.NotFinite as error:
            kept = checkpoint.steps(self.directory)
            last = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint was due yet"
            sys.exit(f"{error}; {last} in {self.directory}; a lower --lr may help")  # exit code 1
        finally:
            signal.signal(signal.SIGTERM, before)

    def _loop(self, advance: Any) -> None:
        begin = time.perf_counter()
        spent = dict(self.seconds)
        sites = jnp.asarray(self.sites if len(self.members) > 1 else self.sites[0], jnp.int32)
        for state, found in train.fit(self.state, self._batches(), train_config(self.config), sites=sites):
            self.state = state
            taken = found.loss.shape[-1]
            self.step += taken
            means = {name: jnp.mean(getattr(found, name).astype(jnp.float32), -1) for name in ("loss", "fvu", "l0")}
            means["dead"] = found.dead[..., -1]
            self.history.append({"step": self.step} | {name: jnp.atleast_1d(v).tolist() for name, v in means.items()})
            feeding = sum(self.seconds[name] - spent[name] for name in ("model", "buffer"))
            self.seconds["SAE"] += time.perf_counter() - begin - feeding
            begin, spent = time.perf_counter(), dict(self.seconds)
            low, high = min(self.history[-1]["fvu"]), max(self.history[-1]["fvu"])
            advance(taken, f"fvu {low:.3f} " if low == high else f"fvu {low:.3f} to {high:.3f} ")
            due, stop = self._due(taken), self.stopping  # read once: the signal may come at any line
            if self.step == self.config.steps or stop or due:
                self._save()
            if stop and self.step < self.config.steps:
                raise cli.Stopped

    def _due(self, taken: int) -> bool:
        every = self.config.checkpoint_every
        return self.step // every > (self.step - taken) // every

    def _batches(self) -> Iterator[jax.Array]:
        """Draws from the buffer, filling it as it empties, until the steps are done."""
        size = self.config.batch_size
        while self.step < self.config.steps:
            self._fill()
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
        while (size := int(self.rows.size)) < self.rows.capacity // 2 + call:
            with self._timed("model"):
                group = self.source.group(self.next_group % self.source.training)
                group.rows.block_until_ready()
            self.next_group += 1
            with self._timed("buffer"):
                keep = sources.wanted(group, self.config.sink_times)
                self.rows = self.rows.add(group.rows, keep)
            dry = dry + 1 if int(self.rows.size) == size else 0
            if dry > self.source.training:
                raise sae.InputError("--sink-times: found no row left by the filter, expected some")

    def _blank(self, sample: jax.Array) -> tuple[train.TrainState, buffer.ShuffleBuffer]:
        """The state before the first step, centred and scaled by `sample`, and an empty buffer."""
        config, states = self.config, []
        largest = max(member.config.k for member in self.members)
        for member, (reads, writes) in zip(self.members, self.sites, strict=True):
            settings, module = train_config(member.config), make_module(member, largest, self.source.d_model)
            target = sample[:, writes] if member.place.transcodes else None
            state = train.init(module, settings, sample[:, reads], target)
            numbers = train.hyper(module, settings, float(member.config.k) if hasattr(module, "k") else None)
            states.append(eqx.tree_at(lambda s: s.hyper, state, numbers))
        rows = buffer.ShuffleBuffer.init(
            capacity=config.buffer_rows,
            sites=len(self.source.sites),
            d_model=self.source.d_model,
            key=jax.random.fold_in(jax.random.key(config.seed), 1),
            dtype=self.source.dtype,
        )
        return states[0] if len(states) == 1 else train.stack(states), rows

    def _save(self) -> None:
        cursor = {"config": settled(self.config), "next_group": self.next_group, "history": self.history}
        checkpoint.save(self.directory, self.step, (self.state, self.rows), cursor, keep=2)

    def _check_same(self, old: dict[str, Any]) -> None:
        new = settled(self.config)
        differences = [
            f"{name} was {old.get(name)!r} and is {new[name]!r}" for name in new if old.get(name) != new[name]
        ]
        if differences:
            where = f"--out {self.config.out}: found the checkpoints of another run"
            raise sae.InputError(f"{where} ({'; '.join(differences)}), expected the same config or a new directory")

    def _timed(self, what: str) -> "Stopwatch":
        return Stopwatch(self.seconds, what)

    def shares(self) -> str:
        """Where the time went."""
        total = sum(self.seconds.values()) or 1.0
        parts = ", ".join(f"{name} {seconds / total:.0%} ({seconds:.1f} s)" for name, seconds in self.seconds.items())
        return f"share of the time: {parts}; compilation included"

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Save every member and measure it on the held-out tasks."""
        held_out = sources.held_out_rows(self.source, self.config.sink_times)
        results = {}
        states = [self.state] if len(self.members) == 1 else train.unstack(self.state)
        for member, state, (reads, writes) in zip(self.members, states, self.sites, strict=True):
            module = train.finish(state)
            x, y = held_out[:, reads], held_out[:, writes]
            mean, total = jnp.mean(y.astype(jnp.float32), axis=0), None
            for rows, target in zip(sources.batches_of(x), sources.batches_of(y), strict=True):
                part = metrics.totals(module, rows, mean, target=target)
                total = part if total is None else jax.tree.map(jnp.add, total, part)
            assert total is not None
            where = self.config.out / "sae" / (member.name if self.config.sweep else "")
            said = facts | member.place.metadata | {"training": settled(member.config)}
            sae.save(module, where, said, density=metrics.density(total))
            found = {"form": self.config.form, "site": str(member.place), "saved": str(where)}
            results[member.name] = metrics.summary(total) | found
        return results


class Stopwatch:
    """Adds the time of a with block to an account."""

    def __init__(self, account: dict[str, float], what: str):
        self.account, self.what = account, what

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.account[self.what] += time.perf_counter() - self.begin
