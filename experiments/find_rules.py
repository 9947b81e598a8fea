"""Find where in depth a model holds which variant of a rule a puzzle follows: linear probes per layer, with controls.

The tasks are procedural, held out, and of families whose rule has variants, such as the side that everything falls to.
A probe learns from half of them and is measured on the others, after each training pair and where the answer is next.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Column, Table

import qwen_eqx
from qwen_lab import bounds, cli, corpus, figures, files, flags, locks, meshes, provenance, rules, wording
from qwen_lab.bounds import Seed, Whole
from qwen_lab.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config(meshes.OnMesh):
    model: str = wording.MODEL
    """Embedded name, directory in Hugging Face's layout, or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    encoder: str = wording.AUTO
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal)). auto: as trained."""
    prompt: str = wording.AUTO
    """Prompt format: a name of arc.PROMPTS. auto: as trained."""
    families: flags.Words = ()
    """Families of procedural tasks. Without it all that have two to eight variants."""
    sides: flags.Sides = (3, 6)
    """Smallest and largest side of the procedural grids."""
    tasks_per_family: Whole = 160
    """Held-out tasks of each family."""
    seed: Seed = 0
    """Of the run. It deals the tasks to the two halves."""
    out: Path = Path("runs/find_rules")
    """Directory of what is written. It is rules.json and rules.svg."""


def main(config: Config) -> None:
    bounds.check(config)
    families = config.families or rules.families()
    for name in families:
        if name not in rules.families():
            raise InputError(f"--families: found {name!r}, expected some of {', '.join(rules.families())}")
    if config.tasks_per_family < 8:
        raise InputError(
            f"--tasks-per-family: found {config.tasks_per_family}, expected at least 8: half of them measure"
        )
    model, tokenizer = config.open_model(config.model, "float32", config.revision)
    config = wording.filled(config, tokenizer)
    with locks.claimed(config.out):
        files.expect_files(config.out, "run.json", "rules.json", "rules.svg")
        provenance.record_run(config.out, config)
        report(config, find(config, model, tokenizer, families))


def find(
    config: Config, model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, families: tuple[str, ...]
) -> dict[str, list[dict[str, Any]]]:
    """Family -> a line for each place and site, with what a model of the same shape with random weights gives."""
    blank = meshes.beside(model, qwen_eqx.Qwen.init(model.config, key=jax.random.key(config.seed), dtype=jnp.float32))
    sites = ["blocks.0.hook_resid_pre", *(f"blocks.{n}.hook_resid_post" for n in range(model.config.layers))]
    results = {}
    for family in cli.progress(families, len(families), "probing", "families"):
        known = rules.tasks(family, config.tasks_per_family, config.sides)
        documents = corpus.documents(
            [task for task, _ in known], tokenizer, max_tokens=model.config.max_seq, encoder=config.encoder,
            format=config.prompt,
        )  # fmt: skip
        labels = [number for _, number in known]
        lines = list(rules.probed(rules.read(model, documents, labels, sites), config.seed))
        others = rules.probed(rules.read(blank, documents, labels, sites), config.seed)
        for line, other in zip(lines, others, strict=True):
            line["random weights"] = other["probe"]
        results[family] = lines
    return results


def report(config: Config, results: dict[str, list[dict[str, Any]]]) -> None:
    """The table of means over the families, the picture and the file."""
    files.write_json(config.out / "rules.json", results)
    flat = [line for lines in results.values() for line in lines]
    whens, sites = (list(dict.fromkeys(line[name] for line in flat)) for name in ("when", "site"))
    controls = ("shuffled", "random weights", "commonest")
    table = Table(
        Column("after", no_wrap=True),
        *whens,
        *controls,
        title="variant read by a linear probe",
        box=figures.SIMPLE_HEAD,
    )
    for site in sites:
        here = [line for line in flat if line["site"] == site]
        row = [np.mean([line["probe"] for line in here if line["when"] == when]) for when in whens]
        row += [np.mean([line[name] for line in here if line["when"] == whens[-1]]) for name in controls]
        table.add_row(_where(site), *(f"{value:.0%}" for value in row))
    cli.console.print(table, soft_wrap=False)
    cli.console.print(f"means over {len(results)} families; controls where the answer is next")
    picture = figures.rules(config.out / "rules.svg", results, whens, sites)
    cli.console.print(f"by depth and by family: {picture}", markup=False)
    cli.console.print(f"wrote: {config.out / 'rules.json'}", markup=False)


def _where(site: str) -> str:
    """`blocks.3.hook_resid_post` in words."""
    _, block, hook = site.split(".")
    return "embedding" if hook.endswith("pre") else f"block {block}"


if __name__ == "__main__":
    cli.run(main, Config)
