"""Tokens per second of reading a prompt, beside the machine's matrix rate and transformers."""

import dataclasses
from pathlib import Path

import equinox as eqx

import measure
from qwen_eqx import Qwen, QwenConfig, prepare


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "Qwen2.5-0.5B"
    """A preset's name, or `tiny`."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    """Of weights, residual stream and cache."""
    prompts: tuple[int, ...] = (256, 1024, 4096)
    """Tokens in the prompt."""
    batch: int = 1
    """Prompts read together."""
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
        asked = {"dtype": dtype, "batches": [config.batch], "prompts": config.prompts, "steps": 0, "repeats": 2}
        theirs = measure.peer(config.peer_python, shape, **asked)
        versions = theirs["versions"] if theirs else versions
        model = measure.random_model(shape, dtype)
        for number, width in enumerate(config.prompts):
            measure.say(f"prefill, {dtype}, {width} tokens")
            taken = prefill_seconds(model, width, config)
            rate = flop(shape, config.batch, width) / taken / 1e9
            peer = theirs["rows"][number]["prefill_ms"] / 1e3 if theirs else None
            row = [dtype, config.batch, width, f"{1e3 * taken:,.0f}", f"{config.batch * width / taken:,.0f}"]
            row += [f"{rate:,.0f}", f"{rate / limits.matrix_gflop_per_s[dtype]:.0%}"]
            row += [None if peer is None else f"{config.batch * width / peer:,.0f}", measure.ratio(taken, peer)]
            rows.append(row)
        del model
    llama = measure.llama(config.llama_bench, config.gguf, prompts=config.prompts, new=0)
    measure.heading("Prefill", f"{config.shape}, chunks of 512 beyond that, random weights")
    print(f"{limits}. Peer: {versions}. {llama}")
    columns = ["dtype", "batch", "prompt", "ms", "tok/s", "GFLOP/s", "of matrix rate", "transformers tok/s"]
    measure.table([*columns, "× transformers' time"], rows)


def prefill_seconds(model: Qwen, width: int, config: Config) -> float:
    """Median seconds from token ids to the first chosen token and a filled cache."""
    prompts = measure.random_prompts(model.config, config.batch, width)
    generator, batch = prepare(model, prompts, max_new_tokens=1)
    prefill = eqx.filter_jit(generator.prefill)
    return measure.seconds(lambda: prefill(model, batch), config.repeats)


def flop(config: QwenConfig, batch: int, seq: int) -> float:
    """2 · weights · tokens without the head, plus 4 · heads · d_head · seq²/2 of causal attention per layer."""
    head = config.vocab * config.d_model
    body = config.parameters - head * (1 if config.tied else 2)
    attention = 2.0 * config.layers * config.heads * config.d_head * seq**2
    return batch * (2.0 * body * seq + 2.0 * head + attention)


if __name__ == "__main__":
    measure.run(main, Config)
