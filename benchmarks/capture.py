"""What capturing costs: a step with and without it, and a step's time against the length of its buffers."""

import dataclasses

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
    repeats: int = 3
    """Timings of which the median is shown, with and without capture in turn."""


def main(config: Config) -> None:
    shape = measure.config_of(config.shape)
    model = measure.random_model(shape, config.dtype)
    rows = []
    for batch in config.batches:
        for length in config.lengths:
            measure.say(f"batch {batch}, room for {length} new tokens")
            without, captured = step_seconds(model, config, batch, length)
            rows.append(
                [batch, length, f"{1e3 * without:.2f}", f"{1e3 * captured:.2f}", f"{captured / without - 1:+.1%}"]
            )
    measure.heading("Capture", f"{config.shape}, {config.dtype}, {config.layers} layers, prompt {config.prompt}")
    measure.table(["batch", "room for tokens", "ms/step without", "ms/step with", "capture costs"], rows)


def step_seconds(model: Qwen, config: Config, batch: int, length: int) -> tuple[float, float]:
    """Seconds per step without and with capture."""
    last = model.config.layers
    capture = Capture(layers=range(max(0, last - config.layers), last))
    prompts = measure.random_prompts(model.config, batch, config.prompt)
    without, captured = (
        measure.step_seconds(
            model, prompts, steps=config.steps, repeats=config.repeats, max_new_tokens=length, capture=asked
        )
        for asked in (None, capture)
    )
    return without, captured


if __name__ == "__main__":
    measure.run(main, Config)
