"""Make the dictionaries that come with the package: an SAE of each block's residual stream, a transcoder of each MLP.

Without flags it rewrites sae/pretrained/tiny-arc. A run that is cut off goes on, as `train_sae.py` does.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from qwen_eqx.weights import hub
from qwen_lab import bounds, cli, figures, files, jobs, locks, meshes, provenance
from qwen_lab.bounds import Count, CountOrNone, Seed
from qwen_lab.settings import Form, RunConfig, training_flags
from sae.formats.load import EMBEDDED
from sae.formats.saelens import CONFIG, SPARSITY, WEIGHTS

MODEL, CARD = "tiny-arc", "README.md"


@dataclasses.dataclass(frozen=True)
class Config(meshes.OnMesh):
    model: str = MODEL
    """Embedded name, directory in Hugging Face's layout, or hub id."""
    form: Form = "batchtopk"
    """Of the dictionary."""
    d_sae: Count = 768
    """Latents."""
    k: CountOrNone = 16
    """Latents that fire per position. Exactly, on average or as a target, as the form's rule is; without it 16."""
    steps: Count = 2000
    """Optimizer steps. May be raised when a run goes on: from its last step it follows the schedule of the new length."""
    limit: CountOrNone = None
    """Tasks to take, from the first; None takes all. Held-out ones are among them."""
    held_out: Count = 120
    """Of these the last so many are never trained on; the metrics at the end are theirs."""
    seed: Seed = 0
    """Of the run. First weights and shuffling are drawn from it."""
    runs: Path = Path("runs/make_dictionaries")
    """Directory of checkpoints and metrics."""
    out: Path = EMBEDDED / MODEL
    """Directory of what is written. It is a directory for each dictionary, and a card."""


def main(config: Config) -> None:
    bounds.check(config)
    model, tokenizer = config.open_model(config.model, "bfloat16")
    asked = dict(kinds(config, model.config.layers))
    for each in asked.values():
        jobs.open_job(each, (model, tokenizer))  # raises for what no run can have
    with locks.claimed(config.out):
        files.fresh_directory(config.out)
        table = {}
        for kind, each in asked.items():
            with cli.bar(each.steps, kind, "steps") as advance:
                results = jobs.train(each, (model, tokenizer), advance)
            for name, result in results.items():
                put(result.saved, config.out / name)
                table[name] = result.metrics
        files.write_text(config.out / CARD, card(config, table))
    cli.console.print(figures.metrics_table(table), soft_wrap=False)
    total = sum(path.stat().st_size for path in config.out.glob("**/*"))
    cli.console.print(f"wrote: {config.out} ({len(table)} dictionaries, {total:,} bytes)", markup=False)
    cli.console.print(f"next: python experiments/find_features.py --sae {config.out}", markup=False)


def kinds(config: Config, blocks: int) -> Iterator[tuple[str, RunConfig]]:
    """What each run is told: one for the residual stream, one for the MLPs."""
    numbers = range(blocks)
    axes = {
        "residual": "layer=" + ",".join(map(str, numbers)),
        "transcoders": "site=" + ",".join(f"blocks.{n}.hook_resid_mid:blocks.{n}.hook_mlp_out" for n in numbers),
    }
    same = ("model", "form", "d_sae", "k", "steps", "limit", "held_out", "seed", "mesh")
    shared: dict[str, Any] = {name: getattr(config, name) for name in same}
    for kind, axis in axes.items():
        yield (
            kind,
            RunConfig(
                **shared, sweep=(axis,), prompts=32, buffer_rows=98_304, max_new_tokens=48, out=config.runs / kind
            ),
        )


def put(source: Path, target: Path) -> None:
    """Copies a saved dictionary; cfg.json last, whose digest tells a half-written directory from a whole one."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, SPARSITY, CONFIG):
        files.write_bytes(target / name, (source / name).read_bytes())


def card(config: Config, table: dict[str, dict[str, Any]]) -> str:
    """What they are, of which weights, how they were made, and how good they are on tasks they never saw."""
    weights = hashlib.sha256((hub.locate(config.model) / "model.safetensors").read_bytes()).hexdigest()
    usual = Config()
    changed = {
        name: getattr(config, name)
        for name in vars(usual)
        if getattr(config, name) != getattr(usual, name) and name not in ("out", "mesh")
    }
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
    told = training_flags(next(iter(dict(kinds(config, 1)).values())))
    lines = [
        f"# Dictionaries of {config.model}",
        "",
        f"{config.form}, {config.d_sae} latents, k {config.k}: the residual stream after each block, and a transcoder of",
        "each MLP, from the stream before it to what it adds.",
        "",
        "| | |",
        "|---|---|",
        f"| model | `{config.model}`, weights `sha256:{weights}` |",
        f"| command | `python experiments/make_dictionaries.py{flags}` |",
        f"| training | {config.steps:,} steps of {told['batch_size']} positions, live, rate {told['lr']:g}, "
        f"seed {config.seed} |",
        f"| machine | {jax.devices()[0].platform}: {jax.devices()[0].device_kind} |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in provenance.versions().items())} |",
        "",
        f"On {next(iter(table.values()))['rows_of']}. Positions that are",
        "attention sinks at one of a kind's sites, norms above ten medians, are left out of training and of this:",
        "",
        "| dictionary | FVU | L0 | dead |",
        "|---|---|---|---|",
    ]
    for name, found in table.items():
        lines.append(f"| `{name}` | {found['fvu']:.3f} | {found['l0']:.1f} | {found['dead_fraction']:.0%} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    cli.run(main, Config)
