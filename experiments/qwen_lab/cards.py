"""The card of a model that was trained here: what it is, how it was made, what it can do and what it cannot."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qwen_eqx.weights import hub
from qwen_lab import files, lessons, provenance
from qwen_lab.errors import InputError
from qwen_lab.lm_settings import LMConfig, settled
from sae.files import read_json, typed

CARD, STAGES = "README.md", "training.json"
_FIELDS = {"command": str, "steps": int, "tasks": int, "seconds": int, "machine": str, "versions": dict}
_LISTS = ("families", "data_sets")  # earlier versions did not write them


def write(
    directory: Path,
    config: LMConfig,
    history: Sequence[Mapping[str, Any]],
    parameters: int,
    before: list[dict[str, Any]],
) -> None:
    """The card of a model directory and the stages it was trained in; `history` is the run's metrics.jsonl."""
    stages = [*before, _stage(config, history)]
    files.write_json(directory / STAGES, {"stages": stages})
    files.write_text(directory / CARD, _text(directory, config, history, parameters, stages))


def stages_before(config: LMConfig) -> list[dict[str, Any]]:
    """The stages of the model that training went on from, as its directory tells them."""
    return [] if config.init is None else stages_of(hub.locate(config.init))


def stages_of(directory: Path) -> list[dict[str, Any]]:
    """The stages that a model directory tells; none where it tells nothing."""
    path = directory / STAGES
    if not path.exists():
        return []
    stages = typed(path, read_json(path), "stages", list)
    for number, stage in enumerate(stages):
        if not isinstance(stage, dict) or any(not isinstance(stage.get(name), kind) for name, kind in _FIELDS.items()):
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in _FIELDS.items())
            raise InputError(f"{path}: stages[{number}]: found {stage!r:.80}, expected {expected}")
        for name in _LISTS:
            if not all(isinstance(each, str) for each in typed(path, stage, name, list, [])):
                raise InputError(f"{path}: stages[{number}]: {name}: found {stage[name]!r:.80}, expected names")
    return stages


def learned(stages: Sequence[Mapping[str, Any]], what: str) -> tuple[str, ...] | None:
    """The "families" or "data_sets" of all stages; None where one does not say, as those of earlier versions."""
    if not stages or any(what not in stage for stage in stages):
        return None
    return tuple(dict.fromkeys(name for stage in stages for name in stage[what]))


def _stage(config: LMConfig, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    trained = [line for line in history if "loss" in line]
    steps, usual, device = trained[-1]["step"] if trained else 0, settled(LMConfig()), jax.devices()[0]
    flags = [
        f"--{name.replace('_', '-')} {_said(value)}" for name, value in settled(config).items() if value != usual[name]
    ]
    families = lessons.families(config.families, config.held_out_families)
    return {
        "command": " ".join(["python experiments/train_lm.py", *flags]),
        "steps": steps,
        "tasks": steps * config.accumulate * config.batch_size,
        "seconds": round(sum(line["seconds"] for line in trained if "seconds" in line)),
        "machine": f"{device.platform}: {device.device_kind}",
        "versions": provenance.versions(),
        "families": list(dict.fromkeys(families)),
        "data_sets": [config.tasks] if config.tasks_share else [],
    }


def _text(
    directory: Path,
    config: LMConfig,
    history: Sequence[Mapping[str, Any]],
    parameters: int,
    stages: list[dict[str, Any]],
) -> str:
    weights = (directory / "model.safetensors").read_bytes()
    measured = next((line for line in reversed(history) if "families" in line), None)
    real = dict.fromkeys(name for stage in stages for name in stage.get("data_sets", []))
    beside = f"; as many as --tasks-share says are of {', '.join(real)} instead, and come again" if real else ""
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
        f"| data | {sum(stage['tasks'] for stage in stages):,} tasks, each seen once, of the families below; colours "
        f"permuted, {config.turned:.0%} turned or mirrored{beside} |",
        f"| loss | next tokens of {'all outputs' if config.learn == 'outputs' else config.learn} |",
    ]
    for number, stage in enumerate(stages, 1):
        lines.append(f"| stage {number} | `{stage['command']}`: {stage['steps']:,} steps, {stage['tasks']:,} tasks |")
    lines += [
        f"| machine | {stages[-1]['machine']}; {sum(stage['seconds'] for stage in stages) / 3600:.1f} hours |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in stages[-1]['versions'].items())} |",
        f"| digest | `sha256:{hashlib.sha256(weights).hexdigest()}` |",
        "",
    ]
    if measured is not None:
        lines += _results(config, measured, stages)
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


def _results(config: LMConfig, measured: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Exact answers on held-out tasks, the families in order of success."""
    trained = {name for stage in stages for name in stage.get("families", [])}
    apart = {name for name in config.held_out_families if name not in trained}  # an earlier stage may have had it
    order = sorted(measured["families"].items(), key=lambda item: -item[1])
    seen = _mean([rate for family, rate in order if family not in apart])
    unseen = _mean([rate for family, rate in order if family in apart])
    lines = [
        "## Exact answers on held-out tasks",
        "",
        f"Greedy, {config.eval_tasks} tasks of each family, after step {measured['step']:,}: {seen:.1%} in the",
        f"mean over the families trained on, {unseen:.1%} over those never trained on.",
        "",
        "| family | exact |",
        "|---|---|",
    ]
    for family, rate in order:
        lines.append(f"| {family}{', never trained on' if family in apart else ''} | {rate:.0%} |")
    return [*lines, ""]


def _mean(rates: Sequence[float]) -> float:
    return sum(rates) / len(rates) if rates else 0.0
