"""What every benchmark shares: medians, the machine's own limits, random models of a given shape, peers, tables."""

import dataclasses
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

import qwen_eqx
from qwen_eqx import PRESETS, GenerationState, Generator, InputError, Qwen, QwenConfig
from qwen_eqx.model.layers import matmul, normal_weight
from qwen_lab import allocation

TINY = QwenConfig("qwen2", 320, 32, 2, 4, 2, 8, 64, 512, rope_theta=10_000.0, tied=True)  # to see that the script runs
SMALL = QwenConfig(  # 45 M parameters: Qwen2.5's vocabulary on a narrow stream
    "qwen2", 151_936, 256, 8, 4, 2, 64, 704, 32_768, rope_theta=1_000_000.0, tied=True
)
ConfigT = TypeVar("ConfigT")


def run(main: Callable[[ConfigT], None], config: type[ConfigT]) -> None:
    """Parses flags into `config` and runs `main`; wrong input is one line and exit code 2."""
    arguments = tyro.cli(config, description=sys.modules[main.__module__].__doc__)
    allocation.begin()  # as every command does
    try:
        main(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def config_of(shape: str) -> QwenConfig:
    """A preset's config, `small`, or `tiny`."""
    known = {"tiny": TINY, "small": SMALL, **PRESETS}
    if shape not in known:
        raise InputError(f"shape: found {shape!r}, expected one of {', '.join(known)}")
    return known[shape]


def say(line: str) -> None:
    """A progress line, on stderr: stdout holds the tables alone."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `call` with its result ready, after one call that is not counted."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def read_bandwidth_gb_per_s(mbytes: int) -> float:
    """Bytes read per second by a sum that all cores share: rows of partial sums, which vectorise.

    `jnp.sum` of the whole array is one chain of additions and reads at half this rate on CPU.
    """
    values = jnp.ones(mbytes * 250_000 // 16384 * 16384, jnp.float32)
    taken = seconds(lambda: _partial_sums(values), 7)
    return values.nbytes / taken / 1e9


@jax.jit
def _partial_sums(values: Float[Array, " n"]) -> Float[Array, "n 16"]:
    return values.reshape(-1, 1024, 16).sum(1)


def matrix_gflop_per_s(dtype: str, size: int) -> float:
    """Multiply-adds per second, counted twice, of one square product accumulated in float32."""
    matrix = normal_weight(jax.random.key(0), (size, size), dtype)
    taken = seconds(lambda: _product(matrix), 5)
    return 2 * size**3 / taken / 1e9


@jax.jit
def _product(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    return matmul(matrix, matrix)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the machine gives to code that does nothing else."""

    read_gb_per_s: float
    matrix_gflop_per_s: dict[str, float]

    @classmethod
    def measured(cls, dtypes: Sequence[str], *, small: bool) -> "Limits":
        say("the machine's read bandwidth and matrix rate")
        rates = {dtype: matrix_gflop_per_s(dtype, 128 if small else 2048) for dtype in dtypes}
        return cls(read_bandwidth_gb_per_s(4 if small else 1000), rates)

    def __str__(self) -> str:
        rates = ", ".join(f"{dtype} {rate:,.0f} GFLOP/s" for dtype, rate in self.matrix_gflop_per_s.items())
        return f"measured read bandwidth {self.read_gb_per_s:.1f} GB/s; matrix rate {rates}"


def random_model(config: QwenConfig, dtype: str) -> Qwen:
    """A model of this shape: weights from N(0, 0.02²), norms one."""
    skeleton = eqx.filter_eval_shape(Qwen.init, config, key=jax.random.key(0), dtype=jnp.dtype(dtype))
    leaves, tree = jax.tree.flatten(skeleton)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = jax.jit(normal_weight, static_argnums=(1, 2))
    model = tree.unflatten(
        jnp.ones(leaf.shape, leaf.dtype) if leaf.ndim == 1 else draw(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    )
    jax.block_until_ready(model)
    allocation.keep()  # as commands do that have loaded one
    return model


def step_seconds(model: Qwen, prompts: np.ndarray, *, steps: int, repeats: int, **options: Any) -> float:
    """Median seconds per step of the compiled loop; `options` go to `qwen_eqx.prepare`."""
    options.setdefault("max_new_tokens", steps * (repeats + 1) + 1)
    run = stepper(model, prompts, steps=steps, **options)
    return statistics.median(run() for _ in range(repeats))


def stepper(model: Qwen, prompts: np.ndarray, *, steps: int, **options: Any) -> Callable[[], float]:
    """A call that takes `steps` more steps and says how many seconds each took; the first ones, which compile, are taken."""
    generator, batch = qwen_eqx.prepare(model, prompts, **options)
    state, _ = eqx.filter_jit(generator.prefill)(model, batch)
    state = jax.block_until_ready(_steps(model, generator, state, steps))

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(_steps(model, generator, state, steps))
        return (time.perf_counter() - start) / steps

    return run


@eqx.filter_jit(donate="all-except-first")  # without donation, every call would copy cache and buffers once
def _steps(model: Qwen, generator: Generator, state: GenerationState, steps: int) -> GenerationState:
    return jax.lax.fori_loop(0, steps, lambda _, s: generator.step(model, s), state)


def weight_bytes(model: Qwen) -> int:
    """Bytes of weights that one decoding step reads: all of them, or all but an embedding table that is not the head."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    return total if model.head is None else total - model.embed.table.nbytes


def random_prompts(config: QwenConfig, batch: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, config.vocab, (batch, width))


def peer(python: Path | None, config: QwenConfig, **ask: Any) -> dict[str, Any] | None:
    """What `transformers_peer.py` measured under another Python, one row per batch and prompt; None without one."""
    if python is None:
        return None
    say(f"transformers, {ask}")
    return ask_peer(python, "transformers_peer.py", ask | {"config": config.to_hf(ask["dtype"])})


def ask_peer(python: Path, script: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What a script beside this one answers under another Python."""
    command = [str(python), str(Path(__file__).with_name(script))]
    environment = os.environ | allocation.ENVIRONMENT
    try:
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment)
    except OSError as error:
        raise InputError(f"peer-python: {python} cannot be run: {error.strerror}") from None
    if done.returncode:
        silent = f"no message, status {done.returncode}" + ": out of memory?" * (done.returncode == -signal.SIGKILL)
        raise InputError(f"peer-python: {python} failed: {(done.stderr.strip().splitlines() or [silent])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def llama(bench: Path | None, gguf: Path | None, *, prompts: Sequence[int], new: int) -> str:
    """A paragraph with the tokens per second that llama.cpp's `llama-bench` measures of a model file at batch 1.

    It is asked for `-o json`: one object a test, with `n_prompt`, `n_gen` and `avg_ts` (tools/llama-bench/README.md).
    """
    if bench is None or gguf is None:
        return "llama.cpp: not asked for (--llama-bench, --gguf).\n"
    asked = ["-p", ",".join(map(str, prompts)) or "0", "-n", str(new)]
    command = [str(bench), "-m", str(gguf), "-t", str(os.cpu_count()), "-o", "json", *asked]
    say(" ".join(command))
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"llama-bench: {bench} cannot be run: {error.strerror}") from None
    try:
        runs = json.loads(done.stdout)
        tests = [f"prompt of {each['n_prompt']}" if each["n_prompt"] else f"decoding {each['n_gen']}" for each in runs]
        rates = [f"{test}: {each['avg_ts']:,.1f}" for test, each in zip(tests, runs, strict=True)]
        return f"llama.cpp {runs[0]['build_commit']}, {runs[0]['model_type']}, tokens/s: {'; '.join(rates)}.\n"
    except (ValueError, TypeError, KeyError, IndexError):
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"llama-bench: {bench} printed no tests as JSON; it said: {said}") from None


def heading(title: str, details: str) -> None:
    """Title and provenance: command, commit, device, versions, date."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    commit = (head.stdout.strip() or "no git") + (" with changes" if changed.stdout.strip() else "")
    device = jax.local_devices()[0]
    kind = _cpu() if device.platform == "cpu" else device.device_kind
    print(f"\n## {title}\n\n{details}. `python {' '.join(sys.argv)}`, commit {commit}, {kind}, "
          f"{os.cpu_count()} CPU cores, jax {jax.__version__}, qwen_eqx from {Path(qwen_eqx.__file__).parent.name}, "
          f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.\n")  # fmt: skip


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, aligned; None is shown as a dash."""
    cells = [list(columns), *[["–" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |", flush=True)


def ratio(ours: float, theirs: float | None) -> str | None:
    """ours / theirs with two digits."""
    return None if theirs is None else f"{ours / theirs:.2f}"
