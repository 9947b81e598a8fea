"""What reading a model costs: a plain call beside its compiled body, and patched runs with all logits or the last's."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import measure
from qwen_eqx import Patch


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "Qwen2.5-0.5B"
    """A preset's name, or `tiny`."""
    dtype: str = "bfloat16"
    """Of weights and residual stream."""
    prompt: int = 256
    """Tokens of the text."""
    layers: int = 4
    """Layers captured, and patched one after another."""
    repeats: int = 5
    """Timings of each call, in turn; medians are shown."""


def main(config: Config) -> None:
    shape = measure.config_of(config.shape)
    model = measure.random_model(shape, config.dtype)
    tokens = measure.random_prompts(shape, 1, config.prompt)[0].tolist()
    layers = range(min(config.layers, shape.layers))
    sites = tuple(f"blocks.{layer}.hook_resid_post" for layer in layers)
    compiled, array = eqx.filter_jit(model.run_with_capture), jnp.asarray(tokens)
    value = jnp.zeros((1, shape.d_model))

    def patched(logits: str) -> list[Any]:
        edits = [Patch(value, jnp.asarray([config.prompt - 1]), site=site) for site in sites]
        return [model.run_with_capture(tokens, [], edits=[edit], logits=logits)[0] for edit in edits]  # pyright: ignore[reportArgumentType]

    calls: dict[str, Callable[[], Any]] = {
        f"a plain call, {len(sites)} sites": lambda: model.run_with_capture(tokens, sites),
        "the same under filter_jit": lambda: compiled(array, sites),
        f"{len(sites)} patched runs, logits of all positions": lambda: patched("all"),
        f"{len(sites)} patched runs, logits of the last": lambda: patched("last"),
    }
    for name, call in calls.items():
        measure.say(name)
        jax.block_until_ready(call())  # compiles
    taken = {name: [] for name in calls}
    for _ in range(config.repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - begin)
    rows = [[name, f"{1e3 * statistics.median(seconds):,.1f}"] for name, seconds in taken.items()]
    measure.heading("Reading", f"{config.shape}, {config.dtype}, {config.prompt} tokens, random weights")
    measure.table(["what", "ms"], rows)


if __name__ == "__main__":
    measure.run(main, Config)
