"""Samples per second of one SAE training step, what its time goes to, a sweep against single steps, and SAELens' step.

python benchmarks/sae_step.py --peer-python /path/to/python-with-sae-lens
"""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

import measure
import sae
from qwen_eqx import InputError
from sae import objectives, train


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    peer_python: Path | None = None  # a Python that has sae-lens; measured in the same run
    batch: int = 4096
    steps: int = 4  # per compiled call
    calls: int = 2  # the best is reported
    members: int = 8  # of the sweep; 0 leaves it out
    pieces: bool = True
    shape: Literal["full", "tiny"] = "full"  # tiny: only to see that everything runs


@dataclasses.dataclass(frozen=True)
class Case:
    """One form and shape in one precision."""

    form: str
    d_model: int
    d_sae: int
    k: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.form} {self.d_model} -> {self.d_sae:,}, k {self.k}, {self.dtype}"


def main(config: Config) -> None:
    shapes = [("topk", 896, 16_384, 32), ("batchtopk", 768, 4_096, 25)]
    tiny = config.shape == "tiny"
    if tiny:
        shapes, config = [("topk", 16, 64, 4), ("batchtopk", 16, 64, 4)], dataclasses.replace(config, batch=32, steps=2)
    cases = [Case(*shape, dtype) for shape in shapes for dtype in ("float32", "bfloat16")]
    rates = {dtype: 1e9 * measure.matrix_gflop_per_s(dtype, 128 if tiny else 2048) for dtype in ("float32", "bfloat16")}
    ours = [step_seconds(case, config) for case in cases]
    theirs, versions = peer_seconds(cases, config)
    rate = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items())
    heading("One training step", f"Batch {config.batch:,}; {versions or 'no peer'}. Matrix rate: {rate}.")
    rows = []
    for case, own, other in zip(cases, ours, theirs, strict=True):
        ideal = 2 * config.batch * case.d_model * case.d_sae / rates[case.dtype]
        peer = ["–", "–"] if other is None else [f"{config.batch / other:,.0f}", f"{other / own:.1f}"]
        rows.append([case, f"{own * 1e3:,.0f}", f"{config.batch / own:,.0f}", f"{ideal / own:.0%}", *peer])
    measure.table(
        ["step", "ms", "samples/s", "one encoder product at the matrix rate", "SAELens samples/s", "ratio"], rows
    )
    if config.pieces:
        print("\nWhere the time goes, ms; the last column is the whole step less the two before:\n")
        rows = []
        for case, own in zip(cases, ours, strict=True):
            chosen, gradient = piece_seconds(case, config)
            parts = [chosen, gradient, own - chosen - gradient]
            rows.append([case, *(f"{part * 1e3:,.0f}" for part in parts)])
        measure.table(["step", "product and selection", "loss and gradient by rows", "Adam, norms, counts"], rows)
    if config.members:
        case, own = cases[-1], ours[-1]
        swept = step_seconds(case, config, config.members)
        print(f"\nA sweep of {config.members} ({case}): {swept * 1e3:,.0f} ms per step of all, "
              f"{swept / (config.members * own):.2f} of {config.members} single steps.")  # fmt: skip


def step_seconds(case: Case, config: Config, members: int = 1) -> float:
    """Best seconds per step of `train.run`, compiled before; of a sweep, per step of all members."""
    told = train.TrainConfig(steps=1000, product_dtype=case.dtype)  # type: ignore[arg-type]
    x = jax.random.normal(jax.random.key(0), (config.steps, config.batch, case.d_model))
    states = [train.init(build(case, seed), told, x[0]) for seed in range(members)]
    state = states[0] if members == 1 else train.stack(states)
    best = float("inf")
    for call in range(config.calls + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train.run(state, x, told))
        if call:  # the first one compiles
            best = min(best, (time.perf_counter() - start) / config.steps)
    return best


def piece_seconds(case: Case, config: Config) -> tuple[float, float]:
    """Seconds of choosing the latents (the dense product and top-k), and of loss and gradient from the chosen."""
    module, dtype = build(case, 0), jnp.dtype(case.dtype)
    told = train.TrainConfig(steps=1)
    numbers = train.hyper(module, told)
    slots = case.k if case.form == "topk" else told.slots * case.k
    x = jax.random.normal(jax.random.key(0), (config.batch, case.d_model))
    choose = eqx.filter_jit(lambda module, x: objectives.select(module, x, numbers, dtype, slots))
    chosen = choose(module, x)

    def loss(module, x, chosen):
        return objectives.sparse_objective(module, x, x, chosen)[0]

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    return measure.seconds(lambda: choose(module, x), 3), measure.seconds(lambda: gradient(module, x, chosen), 3)


def build(case: Case, seed: int) -> Any:
    return sae.FORMS[case.form].init(d_model=case.d_model, d_sae=case.d_sae, k=case.k, key=jax.random.key(seed))  # type: ignore[call-arg]


def peer_seconds(cases: list[Case], config: Config) -> tuple[list[float | None], str | None]:
    """SAELens' seconds for each case (bfloat16: its autocast), and its versions; None without a peer."""
    if config.peer_python is None:
        return [None] * len(cases), None
    asked = [
        dataclasses.asdict(case) | {"batch": config.batch, "steps": config.calls, "autocast": case.dtype == "bfloat16"}
        for case in cases
    ]
    for case in asked:
        del case["dtype"]
    found = ask_saelens(config.peer_python, {"threads": os.cpu_count(), "cases": asked})
    return found["seconds"], found["versions"]


def ask_saelens(python: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What saelens_peer.py answers under another Python."""
    script = Path(__file__).with_name("saelens_peer.py")
    try:
        done = subprocess.run([str(python), str(script)], input=json.dumps(asked), capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"peer-python: {python} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise InputError(f"peer-python: {python} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def heading(title: str, details: str) -> None:
    """Title and provenance: command, commit, device, versions, date."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    commit = found.stdout.strip() or "unknown"
    device = jax.local_devices()[0]
    kind = _cpu() if device.platform == "cpu" else device.device_kind
    command, date = f"python {' '.join(sys.argv)}", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    place = f"{kind}, {os.cpu_count()} CPU cores, jax {jax.__version__}"
    print(f"\n## {title}\n\n{details} `{command}`, commit {commit}, {place}, {date}.\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.machine()


if __name__ == "__main__":
    measure.run(main, Config)
