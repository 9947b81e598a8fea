"""Which features a trainer finds: a quarter of SynthSAEBench-16k, ours and SAELens' trainer on the same rows.

python benchmarks/synth.py --peer-python /path/to/python-with-sae-lens

Rows are made once and kept in the work directory; every run (trainer, form, seed) is added to results.jsonl there and
not done again, so a long benchmark may be stopped, continued and split by --forms, --seeds and --trainers.
"""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import measure
import sae
from qwen_eqx import InputError
from qwen_lab import allocation
from sae import AbstractDictionary
from sae import training as train
from sae.data import synthetic
from sae.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the data and of the SAEs."""

    model: synthetic.SyntheticConfig
    d_sae: int
    k: int
    widths: tuple[int, ...]  # of Matryoshka
    batch: int
    rows: int
    held_out: int


SHAPES = {
    # the published laws; 16,384 features, 128 trees, 4,096 latents and k 25 each over four (k is 3/4 of the true L0)
    "quarter": Shape(
        synthetic.SyntheticConfig(features=4096, d_model=256, roots=32), 1024, 12, (32, 128, 512, 1024), 1024, 2**20, 2**16
    ),
    "tiny": Shape(
        synthetic.SyntheticConfig(features=64, d_model=16, roots=4, depth=1), 32, 3, (8, 32), 64, 64 * 8, 256
    ),
}  # fmt: skip
Trainer = Literal["ours", "saelens"]
COLUMNS = ("mcc", "f1", "precision", "recall", "uniqueness", "r_squared", "l0", "dead_fraction")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train and on what."""

    shape: str = "quarter"
    forms: tuple[str, ...] = ("topk", "batchtopk", "matryoshka", "jumprelu")
    seeds: tuple[int, ...] = (0, 1, 2)
    trainers: tuple[Trainer, ...] = ("ours", "saelens")  # SAELens' only with a peer_python
    peer_python: Path | None = None  # a Python that has sae-lens
    passes: int = 4  # over the rows, in the same order
    learning_rate: float = 1e-3  # constant, then falling to 0 over the last fifth
    work: Path = Path("runs/synth")


def main(config: Config) -> None:
    allocation.keep()
    if config.shape not in SHAPES:
        raise InputError(f"shape: found {config.shape!r}, expected one of {', '.join(SHAPES)}")
    shape, work = SHAPES[config.shape], config.work / config.shape
    make_data(shape, work)
    log = work / "results.jsonl"
    for seed in config.seeds:
        for form in config.forms:
            for trainer in config.trainers:
                if trainer == "saelens" and config.peer_python is None:
                    continue
                run = {"trainer": trainer, "form": form, "seed": seed, "passes": config.passes,
                       "learning_rate": config.learning_rate}  # fmt: skip
                if not any(run.items() <= done.items() for done in results(log)):
                    measure.say(", ".join(f"{name} {value}" for name, value in run.items()))
                    found = one(shape, work, config, trainer, form, seed)
                    with log.open("a") as file:
                        file.write(json.dumps(run | found) + "\n")
    report(shape, config, results(log))


def one(shape: Shape, work: Path, config: Config, trainer: Trainer, form: str, seed: int) -> dict[str, Any]:
    """Train one SAE and measure it on held-out rows."""
    steps = shape.rows // shape.batch * config.passes
    if trainer == "ours":
        start = time.perf_counter()
        module = fit(shape, work, config, form, seed)
        return {"seconds": time.perf_counter() - start, **score(module, work), "versions": f"jax {jax.__version__}"}
    settings: dict[str, Any] = {"d_sae": shape.d_sae}
    if form == "jumprelu":
        settings |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(shape.k)}
    else:
        settings["k"] = shape.k
    if form == "matryoshka":
        settings["matryoshka_widths"] = list(shape.widths)
    directory = work / f"saelens-{form}-{seed}"
    asked = {"form": form, "settings": settings, "rows": str(work / "train.npy"), "batch": shape.batch,
             "passes": config.passes, "learning_rate": config.learning_rate, "decay_steps": steps // 5, "seed": seed,
             "directory": str(directory)}  # fmt: skip
    assert config.peer_python is not None
    found = measure.ask_peer(config.peer_python, "sae_peers.py", {"threads": os.cpu_count(), "train": asked})
    return {"seconds": found["seconds"], **score(sae.load(directory), work), "versions": found["versions"]}


def fit(shape: Shape, work: Path, config: Config, form: str, seed: int) -> AbstractDictionary:
    """Our trainer over the same rows."""
    rows = np.load(work / "train.npy", mmap_mode="r")
    per_pass = shape.rows // shape.batch
    steps, at_once = per_pass * config.passes, min(per_pass, 64)
    extra: dict[str, Any] = {} if form == "jumprelu" else {"k": shape.k}
    if form == "matryoshka":
        extra["widths"] = shape.widths
    module = sae.FORMS[form].init(d_model=rows.shape[1], d_sae=shape.d_sae, key=jax.random.key(seed), **extra)
    told = train.TrainConfig(
        steps=steps,
        learning_rate=config.learning_rate,
        decay_steps=steps // 5,
        dead_after=1000 * shape.batch,
        sparsity=1.0 if form == "jumprelu" else 0.0,
        target_l0=float(shape.k) if form == "jumprelu" else 0.0,
    )
    state = train.init(module, told, jnp.asarray(rows[: 16 * shape.batch]))

    def batches():
        for call in range(steps // at_once):
            start = call * at_once % per_pass * shape.batch
            part = rows[start : start + at_once * shape.batch]
            yield jnp.asarray(part.reshape(at_once, shape.batch, -1))

    last = state
    for last, found in train.fit(state, batches(), told):
        if int(last.step) % (8 * at_once) == 0:
            measure.say(f"step {int(last.step)} of {steps}: fvu {float(found.fvu[-1]):.4f}, "
                        f"l0 {float(found.l0[-1]):.1f}, dead {int(found.dead[-1])}")  # fmt: skip
    return train.finish(last)


def score(module: AbstractDictionary, work: Path) -> dict[str, float]:
    """Held-out metrics of a module, whoever trained it."""
    x, true = jnp.asarray(np.load(work / "held_out.npy")), jnp.asarray(np.load(work / "directions.npy"))
    coefficients = np.load(work / "coefficients.npy", mmap_mode="r")
    z = jnp.concatenate([module.encode(part) for part in jnp.split(x, 4)])
    kept = ("fvu", "l0", "dead_fraction", "dense_fraction")
    found = metrics.evaluate(module, jnp.split(x, 4), jnp.mean(x, axis=0))
    return {
        "mcc": synthetic.mcc(module.decoder, true),
        "uniqueness": synthetic.uniqueness(module.decoder, true),
        **synthetic.classification(z, jnp.asarray(coefficients, jnp.float32), module.decoder, true),
        "r_squared": found["explained_variance"],
        **{name: found[name] for name in kept},
    }


def make_data(shape: Shape, work: Path) -> None:
    """Rows to train on, rows held out with their coefficients, and the features, once; the same on every machine."""
    if (work / "directions.npy").exists():  # written last
        return
    work.mkdir(parents=True, exist_ok=True)
    model = synthetic.SyntheticModel.init(shape.model, key=jax.random.key(1000))
    sample = jax.jit(lambda model, key: model.sample(min(4096, shape.held_out), key=key))
    keys = {"train": jax.random.key(1001), "held_out": jax.random.key(1002)}
    for name, count in (("train", shape.rows), ("held_out", shape.held_out)):
        rows = np.lib.format.open_memmap(work / f"{name}.npy", "w+", np.float32, (count, shape.model.d_model))
        truth = np.zeros((count if name == "held_out" else 0, shape.model.features), np.float16)
        at_once = min(4096, shape.held_out)
        for start in range(0, count, at_once):
            if start % (16 * at_once) == 0:
                measure.say(f"{name}: row {start} of {count}")
            x, coefficients = sample(model, jax.random.fold_in(keys[name], start))
            rows[start : start + at_once] = x
            if len(truth):
                truth[start : start + at_once] = coefficients
        if len(truth):
            np.save(work / "coefficients.npy", truth)
    np.save(work / "directions.npy", model.directions)


def results(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def report(shape: Shape, config: Config, done: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds, of every run in the log with these passes and this rate."""
    done = [run for run in done if (run["passes"], run["learning_rate"]) == (config.passes, config.learning_rate)]
    steps = shape.rows // shape.batch * config.passes
    versions = sorted({run["versions"] for run in done})
    measure.heading(
        "Features found",
        f"{shape.model.features:,} features in {shape.model.d_model} dimensions, {shape.d_sae:,} latents, k "
        f"{shape.k}; {steps:,} steps of {shape.batch} rows, {config.passes} passes over {shape.rows:,}, learning rate "
        f"{config.learning_rate:g}, Adam; {shape.held_out:,} rows held out. {'; '.join(versions)}",
    )
    rows = []
    for form in dict.fromkeys(run["form"] for run in done):
        for trainer in ("ours", "saelens"):
            runs = [run for run in done if (run["form"], run["trainer"]) == (form, trainer)]
            if runs:
                cells = (spread([run[name] for run in runs]) for name in COLUMNS)
                rows.append([form, trainer, len(runs), *cells, f"{statistics.mean(r['seconds'] for r in runs):.0f}"])
    measure.table(["form", "trainer", "seeds", *COLUMNS, "seconds"], rows)


def spread(values: list[float]) -> str:
    digits = 1 if max(values) > 2 else 3
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    measure.run(main, Config)
