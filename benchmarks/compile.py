"""Seconds of compiling `generate`, first and from the persistent cache, each in its own process; and the bytes it takes."""

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
from qwen_eqx import Capture, GenerationState, Generator, PromptBatch, Qwen, prepare
from qwen_eqx.weights.hf import skeleton


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
            taken = in_a_process(cache)
            rows.append([which, f"{taken['trace_s']:.1f}", f"{taken['compile_s']:.1f}", f"{taken['total_s']:.1f}"])
    title = f"{config.shape}, {config.dtype}, batch {config.batch}, prompt {config.prompt}, "
    measure.heading(
        "Compilation and memory",
        f"{title}{config.max_new_tokens} new tokens, {config.layers} layers kept, random weights",
    )
    measure.table(["compilation", "trace and lower s", "compile s", "total s"], rows)
    print()
    print(f"Plan (the formula): {taken['plan_bytes'] / 1e6:,.1f} MB of cache and buffers. By the compiler's account:\n")
    measure.table(["program", "outputs MB", "of them in the inputs' place MB", "temporaries MB"], memory(config))


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
    arrays, static, generator, batch = program_parts(config)
    start = time.perf_counter()
    lowered = jax.jit(program_of(generator, static)).lower(arrays, batch)
    traced = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    plan = generator.settings.memory_plan(static.config, prompts=config.batch, width=batch.tokens.shape[1])
    return {
        "trace_s": traced - start,
        "compile_s": end - traced,
        "total_s": end - start,
        "plan_bytes": plan.total_bytes,
    }


def memory(config: Config) -> list[list[str]]:
    """Megabytes of outputs and temporaries: `prefill`, `loop` with its state donated, and both as one program."""
    arrays, static, generator, batch = program_parts(config)

    def prefill(arrays: Qwen, batch: PromptBatch) -> Any:
        return generator.prefill(eqx.combine(arrays, static), batch)

    def loop(arrays: Qwen, state: GenerationState) -> GenerationState:
        return generator.loop(eqx.combine(arrays, static), state)

    state, _ = jax.eval_shape(prefill, arrays, batch)
    rows = []
    for name, program in {
        "prefill": jax.jit(prefill).lower(arrays, batch),
        "loop": jax.jit(loop, donate_argnums=1).lower(arrays, state),
        "generate": jax.jit(program_of(generator, static)).lower(arrays, batch),
    }.items():
        measure.say(f"memory, {name}")
        account = program.compile().memory_analysis()
        assert account is not None
        sizes = account.output_size_in_bytes, account.alias_size_in_bytes, account.temp_size_in_bytes
        rows.append([name, *(f"{size / 1e6:,.1f}" for size in sizes)])
    return rows


def program_parts(config: Config) -> tuple[Qwen, Qwen, Generator, PromptBatch]:
    """The model's shapes (compiling needs no weights), what is static in it, and what it is asked to generate."""
    shape = measure.config_of(config.shape)
    model = skeleton(shape, jnp.dtype(config.dtype))
    capture = Capture(layers=range(max(0, shape.layers - config.layers), shape.layers)) if config.layers else None
    prompts = measure.random_prompts(shape, config.batch, config.prompt)
    generator, batch = prepare(model, prompts, max_new_tokens=config.max_new_tokens, capture=capture)
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return arrays, static, generator, jax.block_until_ready(batch)


def program_of(generator: Generator, static: Qwen) -> Callable[[Qwen, PromptBatch], tuple[Any, ...]]:
    """What `qwen_eqx.generate` compiles: prefill and loop, with the outputs it keeps."""

    def run(arrays: Qwen, batch: PromptBatch) -> tuple[Any, ...]:
        model = eqx.combine(arrays, static)
        state, prompt_activations = generator.prefill(model, batch)
        state = generator.loop(model, state)
        return state.tokens, state.length, state.log_probs, state.buffer, prompt_activations

    return run


if __name__ == "__main__":
    measure.run(main, Config)
