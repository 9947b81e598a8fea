"""Tokens per second of one training step, beside the machine's matrix rate and transformers with torch."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

import measure
from prefill import flop
from qwen_eqx import QwenConfig, training
from qwen_eqx.training import Batch, TrainConfig

TINY_ARC = QwenConfig(
    "qwen3", 512, 128, 6, 4, 2, 32, 384, 32_768, rope_theta=10_000.0, tied=True
)  # of the embedded model


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "tiny-arc"
    """`tiny-arc`, a preset's name, or `tiny`."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the computation; weights and the optimizer are float32."""
    batch: int = 32
    """Documents of one step."""
    seq: int = 225
    """Tokens of a document, the last of which is only predicted."""
    remat: bool = False
    """Compute the inside of blocks again for the gradient."""
    steps: int = 3
    """Steps of one timing."""
    repeats: int = 3
    """Timings of which the median is shown."""
    peer_python: Path | None = None
    """A Python with torch and transformers, to be measured in the same run: its best of float32 and bf16 autocast."""


def main(config: Config) -> None:
    shape = TINY_ARC if config.shape == "tiny-arc" else measure.config_of(config.shape)
    limits = measure.Limits.measured(config.dtypes, small=config.shape == "tiny")
    training_of = {"training": {"batch": config.batch, "seq": config.seq, "steps": config.steps * config.repeats}}
    asked = {"dtype": "float32", "batches": [], "prompts": [], "repeats": 0, "steps": 0}
    theirs = measure.peer(config.peer_python, shape, **asked, **training_of)
    peer = None if theirs is None else min(theirs["training_ms"].values()) / 1e3
    rows = []
    tokens = config.batch * (config.seq - 1)
    for dtype in config.dtypes:
        measure.say(f"training, {dtype}")
        taken = step_seconds(shape, dtype, config)
        rate = 3 * flop_of_step(shape, config) / taken / 1e9  # the gradient is two products for each of the pass's
        row = [dtype, config.batch, config.seq - 1, f"{1e3 * taken:,.0f}", f"{tokens / taken:,.0f}", f"{rate:,.0f}"]
        row += [f"{rate / limits.matrix_gflop_per_s[dtype]:.0%}", None if peer is None else f"{tokens / peer:,.0f}"]
        rows.append([*row, None if peer is None else f"{peer / taken:.2f}"])
    measure.heading("Training", f"{config.shape}, {shape.parameters:,} parameters, AdamW, every token weighs alike")
    said = "not asked for (--peer-python)"
    if theirs is not None:
        each = ", ".join(f"{name} {taken:,.0f} ms" for name, taken in theirs["training_ms"].items())
        said = f"{theirs['versions']}; {each} a step"
    print(f"{limits}. Peer: {said}.\n")
    columns = ["dtype", "batch", "seq", "ms", "tok/s", "GFLOP/s", "of matrix rate", "torch tok/s", "× torch's speed"]
    measure.table(columns, rows)


def step_seconds(shape: QwenConfig, dtype: str, config: Config) -> float:
    """Median seconds of a step, `config.steps` to a call."""
    told = TrainConfig(steps=10**6, dtype=dtype, remat=config.remat, weight_decay=0.01)  # pyright: ignore[reportArgumentType]
    tokens = np.random.default_rng(0).integers(0, shape.vocab, (config.steps, 1, config.batch, config.seq))
    weights = np.ones(tokens.shape, np.float32)
    batches = jax.device_put(Batch(tokens.astype(np.int32), weights, weights > 0))
    state = training.init(measure.random_model(shape, "float32"), told)

    def run() -> object:
        nonlocal state
        state, metrics = training.run(state, batches, told)
        return state, metrics

    return measure.seconds(run, config.repeats) / config.steps


def flop_of_step(shape: QwenConfig, config: Config) -> float:
    """Of one pass over the batch, with logits at every position."""
    seq = config.seq - 1
    return flop(shape, config.batch, seq) + 2.0 * config.batch * (seq - 1) * shape.vocab * shape.d_model


if __name__ == "__main__":
    measure.run(main, Config)
