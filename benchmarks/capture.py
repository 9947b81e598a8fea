"""What capturing costs: a step with and without it, and a step's time against the length of its buffers."""

import dataclasses
import statistics

import numpy as np

import measure
from qwen_eqx import Capture, Qwen


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "Qwen2.5-0.5B"
    """A preset's name, or `tiny`."""
    dtype: str = "bfloat16"
    """Of weights, residual stream, cache and captured activations."""
    batches: tuple[int, ...] = (1, 8)
    """Rows decoded together."""
    layers: int = 14
    """Layers captured, the last ones."""
    prompt: int = 256
    """Tokens read before the first step."""
    lengths: tuple[int, ...] = (64, 512, 2048)
    """New tokens that cache and activation buffer have room for, while as many steps are taken as in the others."""
    steps: int = 16
    """Steps per timing."""
    repeats: int = 9
    """Timings without and with capture, in turn; medians are shown, and the median of the pairs' ratios."""


def main(config: Config) -> None:
    shape = measure.config_of(config.shape)
    model = measure.random_model(shape, config.dtype)
    rows = []
    for batch in config.batches:
        for length in config.lengths:
            measure.say(f"batch {batch}, room for {length} new tokens")
            pairs = step_seconds(model, config, batch, length)
            without, captured = (statistics.median(side) for side in zip(*pairs, strict=True))
            costs = [captured / without - 1 for without, captured in pairs]
            low, middle, high = np.quantile(costs, [0.25, 0.5, 0.75])
            row = [batch, length, f"{1e3 * without:.2f}", f"{1e3 * captured:.2f}", f"{middle:+.1%}"]
            rows.append([*row, f"{low:+.1%} to {high:+.1%}"])
    measure.heading(
        "Capture", f"{config.shape}, {config.dtype}, {config.layers} layers, prompt {config.prompt}, random weights"
    )
    measure.table(["batch", "room for tokens", "ms/step without", "ms/step with", "capture costs", "quartiles"], rows)


def step_seconds(model: Qwen, config: Config, batch: int, length: int) -> list[tuple[float, float]]:
    """Seconds per step without and with capture, measured in turn."""
    last = model.config.layers
    capture = Capture(layers=range(max(0, last - config.layers), last))
    prompts = measure.random_prompts(model.config, batch, config.prompt)
    without, captured = (
        measure.stepper(model, prompts, steps=config.steps, max_new_tokens=length, capture=asked)
        for asked in (None, capture)
    )
    return [(without(), captured()) for _ in range(config.repeats)]


if __name__ == "__main__":
    measure.run(main, Config)
