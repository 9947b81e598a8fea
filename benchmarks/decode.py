"""Milliseconds per decoding step, beside the machine's read bandwidth, the step's own matrix products, and transformers."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import measure
from qwen_eqx import Qwen
from qwen_eqx.model.layers import matmul


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "Qwen2.5-0.5B"
    """A preset's name, or `tiny`."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of weights, residual stream and cache."""
    batches: tuple[int, ...] = (1, 8)
    """Rows decoded together."""
    prompt: int = 256
    """Tokens read before the first step."""
    steps: int = 16
    """Steps per timing."""
    repeats: int = 3
    """Timings of which the median is shown."""
    peer_python: Path | None = None
    """A Python with torch and transformers, to be measured in the same run."""
    llama_bench: Path | None = None
    """llama.cpp's `llama-bench`, to be measured in the same run."""
    gguf: Path | None = None
    """The same model for it."""


def main(config: Config) -> None:
    shape = measure.config_of(config.shape)
    limits = measure.Limits.measured(config.dtypes, small=config.shape == "tiny")
    rows, versions = [], "not asked for (--peer-python)"
    for dtype in config.dtypes:
        asked = {"dtype": dtype, "batches": config.batches, "prompts": [config.prompt], "steps": 12, "repeats": 1}
        theirs = measure.peer(config.peer_python, shape, **asked)
        versions = theirs["versions"] if theirs else versions
        model = measure.random_model(shape, dtype)
        for number, batch in enumerate(config.batches):
            measure.say(f"decode, {dtype}, batch {batch}")
            prompts = measure.random_prompts(shape, batch, config.prompt)
            step = measure.step_seconds(model, prompts, steps=config.steps, repeats=config.repeats)
            products = products_seconds(model, batch, config)
            peer = theirs["rows"][number]["step_ms"] if theirs else None
            rows.append([dtype, batch, *figures(step, products, peer, measure.weight_bytes(model), limits)])
        del model
    llama = measure.llama(config.llama_bench, config.gguf, prompts=[], new=config.steps)
    measure.heading("Decoding", f"{config.shape}, prompt {config.prompt}, random weights")
    print(f"{limits}. GB/s counts the weights alone, and so does the floor. Peer: {versions}. {llama}")
    columns = ["dtype", "batch", "ms/step", "tok/s·row", "GB/s", "of bandwidth", "floor ms", "× floor"]
    measure.table([*columns, "products ms", "× products", "transformers ms", "× transformers"], rows)


def figures(
    step: float, products: float, peer_ms: float | None, weights: int, limits: measure.Limits
) -> list[str | None]:
    """A row of the table from seconds per step."""
    floor = weights / limits.read_gb_per_s / 1e9
    return [
        f"{1e3 * step:.1f}",
        f"{1 / step:.1f}",
        f"{weights / step / 1e9:.1f}",
        f"{floor / step:.0%}",
        f"{1e3 * floor:.1f}",
        f"{step / floor:.2f}",
        f"{1e3 * products:.1f}",
        f"{step / products:.2f}",
        None if peer_ms is None else f"{peer_ms:.1f}",
        None if peer_ms is None else f"{1e3 * step / peer_ms:.2f}",
    ]


def products_seconds(model: Qwen, batch: int, config: Config) -> float:
    """Median seconds of one step's matrix products alone, each reading what the one before it gave."""
    x = jnp.full((batch, model.config.d_model), 0.01, model.dtype)
    return measure.seconds(lambda: _products(model, x, config.steps), config.repeats) / config.steps


@eqx.filter_jit
def _products(model: Qwen, x: Float[Array, "batch d_model"], steps: int) -> Float[Array, "batch d_model"]:
    def step(_: object, x: Float[Array, "batch d_model"]) -> Float[Array, "batch d_model"]:
        for block in model.blocks:
            q, k, v = (matmul(x, part.weight).astype(x.dtype) for part in (block.attn.q, block.attn.k, block.attn.v))
            x = x + matmul(q, block.attn.o.weight).astype(x.dtype)
            x = x + (k + v).mean(axis=1, keepdims=True)
            gate, up = (matmul(x, part.weight).astype(x.dtype) for part in (block.mlp.gate, block.mlp.up))
            x = x + matmul(gate * up, block.mlp.down.weight).astype(x.dtype)
        logits = matmul(x, model.embed.table if model.head is None else model.head.weight)
        back = logits[:, : x.shape[1]]
        return (back / jnp.abs(back).max()).astype(x.dtype)  # neither overflows nor dies away

    return jax.lax.fori_loop(0, steps, step, x)


if __name__ == "__main__":
    measure.run(main, Config)
