"""Rows of an attribution graph per second, beside circuit-tracer's and the machine's matrix rate, and their memory."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import measure
import qwen_eqx
import sae
from qwen_lab import allocation
from qwen_lab.circuits import Options, Room, direct_effects, replace
from qwen_lab.circuits.rows import batches, ends
from qwen_lab.circuits.tracing import Logits, Tracer
from resident import peak_bytes, reset_peak
from sae.forms.transcoders import Layer


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "small"
    """`small` (45 M parameters), a preset's name, or `tiny`."""
    layers: int | None = None
    """Only so many blocks of it."""
    d_sae: int = 16_384
    """Features a layer."""
    k: int = 32
    """Features that fire at a position, in the mean."""
    prompts: tuple[int, ...] = (256, 1024)
    """Tokens of each text."""
    targets: int = 256
    """Features that are traced: drawn at random from all that fire."""
    batch: int = 16
    """Targets of one sweep."""
    repeats: int = 3
    """Timings; the median is shown. circuit-tracer is timed once."""
    peer_python: Path | None = None
    """A Python that has circuit-tracer."""
    peer_targets: int = 64
    """How many of the features circuit-tracer traces."""
    peer_gb: float = 6.0
    """What circuit-tracer's batch may take beside its weights: it holds patterns and streams for every target."""


def main(config: Config) -> None:
    shape = measure.config_of(config.shape)
    shape = dataclasses.replace(shape, layers=config.layers or shape.layers, max_seq=max(64, *config.prompts))
    limit = measure.matrix_gflop_per_s("float32", 128 if config.shape == "tiny" else 2048)
    rows, said = [], "circuit-tracer not asked for (--peer-python)"
    with tempfile.TemporaryDirectory() as home:
        alone(written, config, shape, Path(home))
        for prompt in config.prompts:
            measure.say(f"{prompt} tokens")
            asked = ask(config, shape, Path(home), prompt)
            ours, theirs = alone(traced, config, shape, asked), None
            if config.peer_python is not None:
                measure.say(f"{prompt} tokens, circuit-tracer, {asked['batch']} targets side by side")
                told = asked | {"targets": ours["targets"][: config.peer_targets]}
                try:
                    theirs = measure.ask_peer(config.peer_python, "trace_peer.py", told)
                    said = f"{theirs['versions']}, {asked['threads']} threads"
                except qwen_eqx.InputError as error:  # such as memory: what is measured here counts
                    said = f"circuit-tracer at {prompt} tokens: {error}"
            rows.append(row(config, shape, asked, ours, theirs, limit))
    size = f"{config.shape}, {shape.layers} layers, {shape.parameters / 1e6:,.1f} M parameters, float32, random weights"
    what = f"{config.d_sae:,} features a layer, sweeps of {config.batch} targets; matrix rate {limit:,.0f} GFLOP/s"
    measure.heading("Tracing", f"{size}; {what}; {said}")
    columns = ["tokens", "features", "targets/s", "of the matrix rate", "GB computed", "GB at peak"]
    measure.table([*columns, "theirs: targets/s", "side by side", "GB at peak", "ours / theirs", "apart"], rows)


def alone(call: Callable[..., Any], *arguments: object) -> Any:
    """What a call returns in a process of its own, so that its memory is its own and is given back."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=allocation.begin) as pool:
        return pool.submit(call, *arguments).result()


def written(config: Config, shape: qwen_eqx.QwenConfig, home: Path) -> None:
    """The model and its transcoders as files: both sides open these.

    What the transcoders read has the length √d_model, so one threshold lets k latents fire in the mean.
    """
    measure.say("writing the model and its transcoders")
    qwen_eqx.save_pretrained(measure.random_model(shape, "float32"), None, home / "model")
    rng = np.random.default_rng(0)
    encoder, decoder = (rng.standard_normal((config.d_sae, shape.d_model), np.float32) for _ in range(2))
    threshold = statistics.NormalDist(0, shape.d_model**0.5).inv_cdf(1 - config.k / config.d_sae)
    zero = np.zeros(config.d_sae, np.float32)
    layer = Layer(encoder, zero, decoder[:, None], np.zeros(shape.d_model, np.float32), zero + np.float32(threshold))
    some = sae.Transcoders(
        (layer,) * shape.layers, "mlp.hook_in", "hook_mlp_out"
    )  # equal layers take as long as others
    sae.save_transcoders(some, home / "transcoders")


def ask(config: Config, shape: qwen_eqx.QwenConfig, home: Path, prompt: int) -> dict[str, Any]:
    """What both sides are told.

    Of each target side by side circuit-tracer holds patterns and about eight streams of every layer, and gathers gradients
    twice for the features of one.
    """
    streams = 4 * prompt * shape.d_model
    a_target = shape.layers * (4 * shape.heads * prompt**2 + 8 * streams) + 2 * config.k * streams
    return {
        "model": str(home / "model"),
        "transcoders": str(home / "transcoders"),
        "tokens": measure.random_prompts(shape, 1, prompt)[0].tolist(),
        "batch": max(1, min(64, config.peer_targets, int(config.peer_gb * 1e9 / a_target))),
        "threads": os.cpu_count() or 1,
    }


def traced(config: Config, shape: qwen_eqx.QwenConfig, asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of all rows, of encoder rows and edges too; the operations of the sweeps; Σ |weights| of each row."""
    transcoders = sae.load_transcoders(asked["transcoders"])
    model = measure.random_model(shape, "float32")  # the one that was written
    reset_peak()
    replacement = replace(model, transcoders, asked["tokens"])
    options = Options(batch=config.batch)
    logits, fired = Logits.of(model, replacement, options), replacement.features
    chosen = np.random.default_rng(0).permutation(len(fired))[: config.targets]
    place = fired.layer[chosen], fired.position[chosen]

    def tracer() -> Tracer:
        made = Tracer(transcoders, replacement, logits, options)
        made.add_features(chosen)
        return made

    for end in ends(replacement.seq):  # compiles
        layer, position, none = np.zeros(1, int), np.full(1, end - 1), jnp.zeros((1, shape.d_model))
        direct_effects(replacement, layer, position, none, config.batch)
    taken, sums = [], np.zeros(0)
    for _ in range(config.repeats):
        start = time.perf_counter()
        sums = tracer().size[chosen]
        taken.append(time.perf_counter() - start)
    return {
        "targets": np.stack([*place, fired.latent[chosen]], axis=1).tolist(),
        "sums": sums,
        "features": len(fired),
        "rows": int(np.bincount(fired.layer).max()) + 2 * replacement.seq,
        "seconds": statistics.median(taken),
        "operations": products(shape, replacement.sources.rows.shape, place, config.batch, replacement.seq),
        "peak_bytes": peak_bytes(),
    }


def products(
    config: qwen_eqx.QwenConfig, rows: tuple[int, ...], place: tuple[np.ndarray, np.ndarray], batch: int, seq: int
) -> float:
    """Operations of the sweeps for targets at these layers and positions: down from the deepest, up to the latest."""
    layer, position = place
    total = 0.0
    for at in batches(layer, position, batch, seq):
        end = next(length for length in ends(seq) if length > position[at].max())
        weights = end * config.d_model * config.d_head * (config.heads + config.kv_heads)
        of_rows = end / seq * rows[1] * rows[2] * config.d_model
        total += (layer[at].max() + 1) * (weights + config.heads * end**2 * config.d_head + of_rows)
    return 2.0 * batch * total


def row(
    config: Config, shape: qwen_eqx.QwenConfig, asked: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any] | None,
    limit: float,
) -> list[object]:  # fmt: skip
    """A line of the table; `apart` is the largest relative difference of the rows' sums."""
    seq, speed = len(asked["tokens"]), len(ours["sums"]) / ours["seconds"]
    rate = ours["operations"] / ours["seconds"] / 1e9 / limit
    room = 4 * shape.parameters + Room.of(shape, seq, ours["rows"], config.batch).total
    line = [seq, f"{ours['features']:,}", f"{speed:,.1f}", f"{rate:.0%}", *gigabytes(room, ours["peak_bytes"])]
    if theirs is None:
        return [*line, None, None, None, None, None]
    count = len(theirs["sums"])
    other = count / theirs["seconds"]
    apart = np.abs(np.asarray(theirs["sums"]) / ours["sums"][:count] - 1).max()
    peak = gigabytes(theirs["peak_bytes"])
    return [*line, f"{other:,.1f}", asked["batch"], *peak, measure.ratio(speed, other), f"{apart:.0e}"]


def gigabytes(*sizes: int) -> list[str | None]:
    return [f"{size / 1e9:,.1f}" if size else None for size in sizes]


if __name__ == "__main__":
    measure.run(main, Config)
