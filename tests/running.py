"""Helpers of generation tests, and experiments run as a user runs them."""

import dataclasses
import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arc
import qwen_eqx
import sae
import tiny
import tolerances
import train_sae
from qwen_eqx import Generation, Qwen
from qwen_lab import RunConfig

ROOT = Path(__file__).parent.parent
PROMPTS = [[5], [9, 8, 7], [1, 2, 3, 4, 5, 6, 7], list(range(20, 36))]  # one token … exactly a bucket
NEW = 6
SMALL = RunConfig(
    limit=6, held_out=2, max_new_tokens=4, d_sae=64, k=4, steps=8, batch_size=64, steps_per_call=2, checkpoint_every=4,
    max_prompt=512, buffer_rows=8192,
)  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A short live run of `train_sae.py`."""
    out = tmp_path_factory.mktemp("trained")
    said = run(train_sae, small(out))
    for word in ("share of the time: model", "buffer", "SAE", "on held-out tasks", "loss curve", "next: python"):
        assert word in said
    return out


def run_experiment(name: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python experiments/NAME.py FLAGS` in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
    )


@eqx.filter_jit
def _forward(model: Qwen, tokens: jax.Array, sites: tuple[str, ...]):
    return model.run_with_capture(tokens, sites)


def forward(model: Qwen, tokens: list[int], sites: list[str], room: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Logits [seq, vocab] and activations [sites, seq, d_model] of a plain pass, in one shape for all lengths."""
    padded = jnp.asarray(tokens + [0] * (room - len(tokens)))  # no position sees a later one
    logits, acts = _forward(model, padded, tuple(sites))
    stacked = np.stack([np.asarray(acts[site], np.float32) for site in sites])
    return np.asarray(logits)[: len(tokens)], stacked[:, : len(tokens)]


@cache
def greedy() -> Generation:
    """What the small model says to PROMPTS; every site captured, prompt and all."""
    return generate(PROMPTS)


def generate(prompts: list[list[int]], **options: Any) -> Generation:
    model = options.pop("model", tiny.model())
    capture = qwen_eqx.Capture(sites=tiny.d_model_sites(model.config), positions="all")
    return qwen_eqx.generate(model, prompts, **({"max_new_tokens": NEW, "capture": capture} | options))


def assert_same(found: Generation, expected: Generation, rows: list[int] | None = None, exact: bool = False):
    """Every field alike; `rows`: which rows of `expected` were found. Prompts stand at the right of their buffer."""
    pick = list(range(len(expected.lengths))) if rows is None else rows
    np.testing.assert_array_equal(found.tokens, np.asarray(expected.tokens)[pick])
    np.testing.assert_array_equal(found.lengths, np.asarray(expected.lengths)[pick])
    pairs = [(np.asarray(found.log_probs), np.asarray(expected.log_probs)[pick])]
    if found.activations is not None and expected.activations is not None:
        pairs.append((np.asarray(found.activations), np.asarray(expected.activations)[:, pick]))
    if found.prompt_activations is not None and expected.prompt_activations is not None:
        ours, theirs = np.asarray(found.prompt_activations), np.asarray(expected.prompt_activations)
        width = min(ours.shape[2], theirs.shape[2])
        pairs.append((ours[:, :, -width:], theirs[:, pick, -width:]))
    for ours, theirs in pairs:
        if exact:
            assert ours.tobytes() == theirs.tobytes()
        else:
            np.testing.assert_allclose(ours, theirs, **tolerances.SAME_F32)


def run(script: Any, config: Any) -> str:
    """What an experiment prints, run in this process: its compilations serve the next."""
    with redirect_stdout(io.StringIO()) as said:
        script.main(config)
    return said.getvalue()


BRIEF = {
    "answered": 0,
    "augmented": 0,
    "timelines": 0,
}  # of evaluate_sae's pages: what it does not generate and read again


def small(out: Path, **fields: Any) -> RunConfig:
    return dataclasses.replace(SMALL, out=out, **fields)


def save_small(where: Path) -> str:
    """A dictionary of the model that tests default to, as nobody trained it; returns its directory."""
    module = sae.TopK.init(d_model=64, d_sae=32, k=4, key=jax.random.key(0))
    sae.save(module, where, {"model_name": "tiny-random", "hook_name": "blocks.2.hook_resid_post"})
    return str(where)


def short_tasks(where: Path, count: int = 3) -> Path:
    """So many tasks whose prompts need no cutting."""
    tasks = sorted(arc.load_tasks("arc-agi-1/training"), key=lambda task: sum(p.input.size for p in task.train))[:count]
    arc.write_tasks(where / "tasks.json", tasks)
    return where / "tasks.json"


SMALL_STAGES = (  # of pipeline.py
    "--extract.limit 3 --extract.max-new-tokens 2 --extract.batch-size 2 --extract.items-per-shard 1 "
    "--train.held-out 1 --train.d-sae 32 --train.k 4 --train.steps 4 --train.batch-size 32 --train.steps-per-call 2 "
    "--train.buffer-rows 8192 --evaluate.limit 1 --evaluate.max-prompt 512 --evaluate.answered 0 --evaluate.augmented 0"
)
