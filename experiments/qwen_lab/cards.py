"""The card of a model that was trained here: what it is, how it was made, what it can do and what it cannot."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qwen_lab import provenance
from qwen_lab.lm_settings import LMConfig, settled

CARD = "README.md"


def text(directory: Path, config: LMConfig, history: Sequence[Mapping[str, Any]], parameters: int) -> str:
    """A model directory's README.md; `history` is the run's metrics.jsonl."""
    weights = (directory / "model.safetensors").read_bytes()
    trained = [line for line in history if "loss" in line]
    measured = next((line for line in reversed(history) if "families" in line), None)
    steps = trained[-1]["step"] if trained else 0
    seconds = sum(line["seconds"] for line in trained if "seconds" in line)
    usual = settled(LMConfig())
    flags = [
        f"--{name.replace('_', '-')} {_said(value)}" for name, value in settled(config).items() if value != usual[name]
    ]
    command = " ".join(["python experiments/train_lm.py", *flags])
    each = config.accumulate * config.batch_size
    device = jax.devices()[0]
    sides = f"{config.sides[0]} to {config.sides[1]}"
    lines = [
        "# A small Qwen that solves made-up puzzles",
        "",
        f"{parameters:,} weights, trained on procedural ARC-like tasks with grids of {sides} a side: three pairs show a",
        "rule, and the model writes the output for a fourth input.",
        "",
        "| | |",
        "|---|---|",
        f"| prompt | format `{config.prompt}`, encoder `{config.encoder}`, in the chat template of this directory |",
        f"| data | {steps * each:,} tasks, each seen once, of the families below; colours permuted, "
        f"{config.turned:.0%} turned or mirrored |",
        f"| loss | next tokens of {'all outputs' if config.learn == 'outputs' else config.learn} |",
        f"| recipe | `{command}`: {steps:,} steps of {each} tasks, {config.optimizer}, rate {config.lr:g}, "
        f"seed {config.seed} |",
        f"| machine | {device.platform}: {device.device_kind}; {seconds / 3600:.1f} hours |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in provenance.versions().items())} |",
        f"| digest | `sha256:{hashlib.sha256(weights).hexdigest()}` |",
        "",
    ]
    if measured is not None:
        lines += _results(config, measured)
    lines += [
        "## What it cannot do",
        "",
        f"It knows no other text than these puzzles in this format: not grids wider than {config.sides[1]} cells,",
        "and not other prompt formats. `evaluate_lm.py --data` measures it on ARC's own tasks.",
        "",
    ]
    return "\n".join(lines)


def _said(value: Any) -> str:
    """A value as a flag takes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _results(config: LMConfig, measured: Mapping[str, Any]) -> list[str]:
    """Exact answers on held-out tasks, the families in order of success."""
    order = sorted(measured["families"].items(), key=lambda item: -item[1])
    lines = [
        "## Exact answers on held-out tasks",
        "",
        f"Greedy, {config.eval_tasks} tasks of each family, after step {measured['step']:,}: {measured['seen']:.1%} in the",
        f"mean over the families trained on, {measured['unseen'] or 0:.1%} over those never trained on.",
        "",
        "| family | exact |",
        "|---|---|",
    ]
    for family, rate in order:
        apart = ", never trained on" if family in config.held_out_families else ""
        lines.append(f"| {family}{apart} | {rate:.0%} |")
    return [*lines, ""]
