"""Samples per second of one SAE training step, what its time goes to, a sweep against single steps, and the peers'.

python benchmarks/sae_step.py --peer-python /path/to/python-with-sae-lens (and eai-sparsify, dictionary-learning)
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

import measure
import sae
from qwen_lab import allocation
from sae import training as train


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    peer_python: Path | None = None  # a Python with sae-lens, eai-sparsify or dictionary-learning; in the same run
    forms: tuple[Literal["topk", "batchtopk"], ...] = ("topk", "batchtopk")
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    batch: int = 4096
    steps: int = 4  # per compiled call
    calls: int = 2  # the best is reported; of sweeps, the median
    members: int = 8  # of the sweep; 0 leaves it out
    pieces: bool = True
    shape: Literal["full", "small", "tiny"] = "full"  # small: 96 -> 256, k 6; tiny: only to see that everything runs


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


OTHERS = {"small": (96, 256, 6), "tiny": (16, 64, 4)}
SIZES = {"topk": (896, 16_384, 32), "batchtopk": (768, 4_096, 25)}


def main(config: Config) -> None:
    allocation.keep()
    tiny = config.shape == "tiny"
    if tiny:
        config = dataclasses.replace(config, batch=32, steps=2)
    sizes = {form: OTHERS.get(config.shape, SIZES[form]) for form in config.forms}
    cases = [Case(form, *sizes[form], dtype) for form in config.forms for dtype in config.dtypes]
    rates = {dtype: 1e9 * measure.matrix_gflop_per_s(dtype, 128 if tiny else 2048) for dtype in config.dtypes}
    ours = [step_seconds(case, config) for case in cases]
    peers = peer_seconds(cases, config)
    versions = ", ".join(peer["version"] for peer in peers.values()) or "no peer"
    rate = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items())
    measure.heading("One training step", f"Batch {config.batch:,}; {versions}. Matrix rate: {rate}")
    rows = []
    for at, (case, own) in enumerate(zip(cases, ours, strict=True)):
        ideal = 2 * config.batch * case.d_model * case.d_sae / rates[case.dtype]
        row = [case, f"{own * 1e3:,.0f}", f"{config.batch / own:,.0f}", f"{ideal / own:.0%}"]
        for peer in peers.values():
            other = peer["seconds"][at]
            row += [None, None] if other is None else [f"{config.batch / other:,.0f}", f"{other / own:.1f}"]
        rows.append(row)
    columns = ["step", "ms", "samples/s", "one encoder product at the matrix rate"]
    measure.table(columns + [cell for name in peers for cell in (f"{name} samples/s", "ratio")], rows)
    if config.pieces:
        pieces(cases, ours, config)
    if config.members:
        sweeps(cases, config)


def pieces(cases: list[Case], ours: list[float], config: Config) -> None:
    print("\nWhere the time goes, ms; the last column is the whole step less the two before:\n")
    rows = []
    for case, own in zip(cases, ours, strict=True):
        chosen, gradient = piece_seconds(case, config)
        parts = [chosen, gradient, own - chosen - gradient]
        rows.append([case, *(f"{part * 1e3:,.0f}" for part in parts)])
    measure.table(["step", "product and selection", "loss and gradient by rows", "Adam, norms, counts"], rows)


def sweeps(cases: list[Case], config: Config) -> None:
    """A call of the sweep, then as many calls of one member, in turn: both as long, on the machine of that minute."""
    members = config.members
    print(f"\nA sweep of {members} on the same rows, ms per step of all members, {config.steps} steps per call:\n")
    rows = []
    for case in cases:
        together, alone = stepper(case, config, members), stepper(case, config, 1)
        together(), alone()  # the first call compiles
        pairs = [(together(), sum(alone() for _ in range(members))) for _ in range(config.calls)]
        swept, single = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        rows.append([case, f"{swept * 1e3:,.0f}", f"{single * 1e3:,.0f}", f"{ratio:.2f}"])
    measure.table(["step", "sweep", f"{members} single steps", "ratio"], rows)


def step_seconds(case: Case, config: Config) -> float:
    """Best seconds per step, compiled before."""
    call = stepper(case, config, 1)
    return min([call() for _ in range(config.calls + 1)][1:])


def stepper(case: Case, config: Config, members: int) -> Callable[[], float]:
    """A compiled call of `train.run`, which says what it took in seconds per step, of all members."""
    told = train.TrainConfig(steps=10**6, product_dtype=case.dtype)  # type: ignore[arg-type]
    x = jax.random.normal(jax.random.key(0), (config.steps, config.batch, case.d_model))
    states = [train.init(build(case, seed), told, x[0]) for seed in range(members)]
    state = states[0] if members == 1 else train.stack(states)

    def call() -> float:
        nonlocal state
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train.run(state, x, told))
        return (time.perf_counter() - start) / config.steps

    return call


def piece_seconds(case: Case, config: Config) -> tuple[float, float]:
    """Seconds of choosing the latents (the dense product and top-k), and of loss and gradient from the chosen."""
    module, dtype = build(case, 0), jnp.dtype(case.dtype)
    told = train.TrainConfig(steps=1)
    numbers = train.hyper(module, told)
    candidates = module.candidates(told.candidates)
    x = jax.random.normal(jax.random.key(0), (config.batch, case.d_model))
    choose = eqx.filter_jit(lambda module, x: module.select(x, numbers, dtype, candidates))
    chosen = choose(module, x)

    def loss(module, x, chosen):
        return module.sparse_loss(x, x, chosen).loss

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    return measure.seconds(lambda: choose(module, x), 3), measure.seconds(lambda: gradient(module, x, chosen), 3)


def build(case: Case, seed: int) -> Any:
    return sae.FORMS[case.form].init(d_model=case.d_model, d_sae=case.d_sae, k=case.k, key=jax.random.key(seed))


def peer_seconds(cases: list[Case], config: Config) -> dict[str, Any]:
    """Library -> its version and its seconds for each case (bfloat16: under autocast, parameters in float32)."""
    if config.peer_python is None:
        return {}
    measure.say("peers")
    asked = [dataclasses.asdict(case) | {"batch": config.batch} for case in cases]
    for case in asked:
        case["autocast"] = case.pop("dtype") == "bfloat16"
    found = measure.ask_peer(
        config.peer_python, "sae_peers.py", {"threads": os.cpu_count(), "cases": asked, "steps": config.calls}
    )
    return found["libraries"]


if __name__ == "__main__":
    measure.run(main, Config)
