"""Useful tokens per second of answers of very different lengths: refilled slots against a fixed loop at the same batch."""

import dataclasses
import time

import jax
import numpy as np
from jaxtyping import Int

import measure
import qwen_eqx
from qwen_eqx import InputError, Qwen


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "tiny"
    """A preset's name, or `tiny`; the full workload on Qwen2.5-0.5B takes several minutes on two cores."""
    dtype: str = "bfloat16"
    """Of weights and cache."""
    slots: int = 8
    """Rows decoded together, in both."""
    prompts: int = 128
    """Answers; the fixed loop takes them in batches of `slots`."""
    prompt: int = 64
    """Tokens in every prompt."""
    longest: int = 1022
    """Tokens of the longest answer."""
    fixed: int = 1100
    """Steps of the fixed loop."""
    seed: int = 0
    """Of prompts and lengths."""


def main(config: Config) -> None:
    if config.fixed < config.longest:
        raise InputError(f"fixed={config.fixed} must be at least longest={config.longest}")
    shape = dataclasses.replace(measure.config_of(config.shape), max_seq=32768)
    model = measure.random_model(shape, config.dtype)
    lengths = answer_lengths(config)
    prompts = measure.random_prompts(shape, config.prompts, config.prompt).tolist()
    refill = refill_seconds(model, prompts, lengths, config)
    fixed = fixed_seconds(model, prompts, config)
    title = f"{config.shape}, {config.dtype}, {config.slots} slots, {config.prompts} prompts of {config.prompt} tokens"
    measure.heading("Scheduler", f"{title}, random weights")
    mean, p95, most = lengths.mean(), np.percentile(lengths, 95), lengths.max()
    print(f"Answers: mean {mean:.0f} tokens, p95 {p95:.0f}, most {most}, {lengths.sum():,} in all.\n")
    useful = int(lengths.sum())
    measure.table(
        ["loop", "seconds", "useful tok/s", "× fixed"],
        [
            [f"fixed, {config.fixed} steps", f"{fixed:.1f}", f"{useful / fixed:,.0f}", "1.00"],
            ["slots refilled", f"{refill:.1f}", f"{useful / refill:,.0f}", f"{fixed / refill:.2f}"],
        ],
    )


def answer_lengths(config: Config) -> Int[np.ndarray, " prompts"]:
    """A log-normal whose mean is 0.175 and whose 95th percentile is about 0.52 of the longest: ARC-AGI-1's answers."""
    drawn = np.random.default_rng(config.seed).lognormal(np.log(0.122), 0.88, config.prompts)
    return np.clip(np.rint(drawn * config.longest), 1, config.longest).astype(np.int64)


def refill_seconds(model: Qwen, prompts: list, lengths: Int[np.ndarray, " prompts"], config: Config) -> float:
    """Seconds of the whole workload through the slots, compiled before."""

    def run(count: int) -> None:
        done = qwen_eqx.schedule(
            model,
            prompts[:count],
            slots=config.slots,
            max_new_tokens=config.longest,
            limits=lengths[:count].tolist(),
        )
        for number, completion in enumerate(done):
            assert completion.length == lengths[completion.item]
            if number % config.slots == 0:
                measure.say(f"refilled slots: {number} of {count} answers")

    run(config.slots)  # compiles
    start = time.perf_counter()
    run(len(prompts))
    return time.perf_counter() - start


def fixed_seconds(model: Qwen, prompts: list, config: Config) -> float:
    """Seconds of `fixed` steps for every batch of prompts: one batch timed, times their number."""
    batches = -(-len(prompts) // config.slots)
    batch = prompts[: config.slots]
    measure.say(f"fixed loop: one of {batches} batches")
    taken = measure.seconds(
        lambda: jax.block_until_ready(qwen_eqx.generate(model, batch, max_new_tokens=config.fixed)), 1
    )
    return taken * batches


if __name__ == "__main__":
    measure.run(main, Config)
