"""What reading a model costs: a plain call beside its compiled body, and patched runs with all logits or the last's."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

import measure
from qwen_eqx import Patch
from qwen_eqx.model.sites import D_MODEL_KINDS, Site


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "small"
    """`small` (45 M parameters), a preset's name, or `tiny`."""
    dtype: str = "float32"
    """Of weights and residual stream."""
    prompt: int = 972
    """Tokens of the text that is captured."""
    layers: int = 8
    """Layers captured, at each of their five sites as wide as the stream."""
    runs: int = 16
    """Patched runs: rows of one batch, each with a value of its own."""
    patched_prompt: int = 256
    """Tokens of the text that is patched."""
    repeats: int = 5
    """Timings of each call, in turn; medians are shown."""


def main(config: Config) -> None:
    shape = measure.config_of(config.shape)
    model = measure.random_model(shape, config.dtype)
    tokens = measure.random_prompts(shape, 1, config.prompt)[0].tolist()
    layers = range(min(config.layers, shape.layers))
    sites = tuple(str(Site(layer, kind)) for layer in layers for kind in D_MODEL_KINDS)
    compiled, array = eqx.filter_jit(model.run_with_capture), jnp.asarray(tokens)
    batch = [measure.random_prompts(shape, 1, config.patched_prompt)[0].tolist()] * config.runs
    values = jax.random.normal(jax.random.key(0), (config.runs, 1, shape.d_model))
    patch = Patch(values, jnp.asarray([config.patched_prompt // 2]), site=f"blocks.{shape.layers // 2}.hook_resid_post")

    last = [f"blocks.{shape.layers - 1}.hook_resid_post"]  # without a site behind the patch no block would be computed

    def patched(logits: Literal["all", "last"] | None) -> Any:
        return model.run_with_capture(batch, last, edits=[patch], logits=logits)

    calls: dict[str, Callable[[], Any]] = {
        f"a plain call, {len(sites)} sites": lambda: model.run_with_capture(tokens, sites),
        "the same under filter_jit": lambda: compiled(array, sites),
        f"{config.runs} patched runs, logits of all positions": lambda: patched("all"),
        "the same, logits of the last": lambda: patched("last"),
        "the same, no logits": lambda: patched(None),
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
    size = f"{config.shape}, {shape.parameters / 1e6:,.1f} M parameters, {config.dtype}, random weights"
    measure.heading("Reading", f"{size}; {config.prompt} tokens captured, {config.patched_prompt} patched")
    measure.table(["what", "ms"], rows)


if __name__ == "__main__":
    measure.run(main, Config)
