"""Seconds of compiling `generate`, at first and from the persistent cache, each in its own process; and its memory."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import measure
from qwen_eqx import Capture, Generator, MemoryPlan, Qwen, prepare
from qwen_eqx.hf import skeleton


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "Qwen2.5-0.5B"
    """A preset's name, or `tiny`."""
    dtype: str = "bfloat16"
    """Of weights, cache and activations."""
    batch: int = 8
    """Prompts."""
    prompt: int = 256
    """Tokens of each."""
    max_new_tokens: int = 256
    """Room for new tokens."""
    layers: int = 14
    """Layers captured, the last ones; 0 for none."""
    child: bool = False
    """Compile once, print the figures as JSON, and end."""


def main(config: Config) -> None:
    if config.child:
        print(json.dumps(compiled(config)))
        return
    measure.config_of(config.shape)  # wrong input is refused here, not in the child
    with tempfile.TemporaryDirectory() as cache:
        rows = []
        for which in ("first", "from the persistent cache"):
            measure.say(f"compile, {which}")
            found = in_a_process(cache)
            rows.append([which, f"{found['trace_s']:.1f}", f"{found['compile_s']:.1f}", f"{found['total_s']:.1f}"])
    title = f"{config.shape}, {config.dtype}, batch {config.batch}, prompt {config.prompt}, "
    measure.heading("Compilation and memory", f"{title}{config.max_new_tokens} new tokens, {config.layers} layers kept")
    measure.table(["compilation", "trace and lower s", "compile s", "total s"], rows)
    print()
    plan, peak = found["plan_bytes"], found["peak_bytes"]
    share = f"{peak / plan:.2f}"
    measure.table(
        ["plan MB (formula)", "outputs and temporaries MB (compiler)", "ratio"],
        [[f"{plan / 1e6:,.1f}", f"{peak / 1e6:,.1f}", share]],
    )


def in_a_process(cache: str) -> dict[str, float]:
    """`compile.py --child` with the same flags and a compilation cache of its own."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compiled(config: Config) -> dict[str, float]:
    """Seconds and bytes of compiling one `generate`."""
    shape = measure.config_of(config.shape)
    model = skeleton(shape, jnp.dtype(config.dtype))  # compiling needs no weights
    capture = Capture(layers=range(max(0, shape.layers - config.layers), shape.layers)) if config.layers else None
    prompts = measure.random_prompts(shape, config.batch, config.prompt)
    generator, inputs = prepare(model, prompts, max_new_tokens=config.max_new_tokens, capture=capture)
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    jax.block_until_ready(inputs)
    start = time.perf_counter()
    lowered = jax.jit(program_of(generator, static)).lower(arrays, inputs)
    traced = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    memory = program.memory_analysis()
    assert memory is not None
    settings = generator.settings
    plan = MemoryPlan.of(
        shape,
        batch=config.batch,
        kv_seq=settings.kv_seq,
        cache_dtype=settings.cache_dtype,
        sites=len(settings.sites),
        captured_positions=config.batch * settings.new,
        capture_dtype=settings.capture_dtype,
    )
    return {
        "trace_s": traced - start,
        "compile_s": end - traced,
        "total_s": end - start,
        "plan_bytes": plan.total_bytes,
        "peak_bytes": memory.output_size_in_bytes + memory.temp_size_in_bytes,
    }


def program_of(generator: Generator, static: Qwen) -> Callable[[Qwen, dict[str, Any]], tuple[Any, ...]]:
    """What `qwen_eqx.generate` compiles: prefill and loop, with the outputs it keeps."""

    def run(arrays: Qwen, inputs: dict[str, Any]) -> tuple[Any, ...]:
        model = eqx.combine(arrays, static)
        state, prompt_activations = generator.prefill(model, **inputs)
        state = generator.loop(model, state)
        return state.tokens, state.length, state.log_probs, state.buffer, prompt_activations

    return run


if __name__ == "__main__":
    measure.run(main, Config)
