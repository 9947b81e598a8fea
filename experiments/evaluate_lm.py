"""Measure how many puzzles a model solves: each family of procedural tasks on seeds nobody trained on, and ARC sets.

Greedy, and by votes over augmentations; beside it a model with random weights, copying the input, and the best constant.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import arc
import qwen_eqx
from arc.generators import COMPOSITIONS, FAMILIES
from qwen_eqx.weights import hub
from qwen_lab import bounds, cards, cli, exams, figures, files, flags, locks, meshes, provenance, wording
from qwen_lab.bounds import Count, Whole
from qwen_lab.errors import InputError
from qwen_lab.lm_settings import HELD_OUT_FAMILIES


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
    sides: flags.Sides = (3, 6)
    """Smallest and largest side of the procedural grids."""
    tasks_per_family: Whole = 20
    """Held-out tasks of each family. 0 for none."""
    held_out_families: flags.Words = ()
    """Families that are never trained on, and measured apart. Without it all that the model's training.json does not
    name; of a model without one those that train_lm.py holds out."""
    compositions: bool = True
    """Measure tasks of two rules, one after the other, too."""
    data: flags.Paths = ()
    """Other data, by name or path. Tasks, such as arc-agi-1/evaluation."""
    data_limit: Count = 400
    """Tasks of each of these, from the first."""
    votes: Count = 8
    """Augmented prompts that vote. 1 asks greedily alone."""
    max_new_tokens: Count = 120
    """Tokens to generate at most."""
    slots: Count = 32
    """Sequences generated together; a slot is refilled when its sequence ends."""
    random: bool = True
    """Measure a model of the same shape with random weights too."""
    out: Path = Path("runs/evaluate_lm")
    """Directory of what is written. It is metrics.json and families.svg."""


def main(config: Config) -> None:
    bounds.check(config)
    for name in config.held_out_families:
        if name not in FAMILIES:
            raise InputError(f"--held-out-families: found {name!r}, expected some of {', '.join(FAMILIES)}")
    asked = questions(config)
    model, tokenizer = config.open_model(config.model, "float32", config.revision)
    config = wording.filled(config, tokenizer)
    stages = cards.stages_of(hub.locate(config.model, config.revision))
    config = dataclasses.replace(config, held_out_families=never_trained_on(config, stages))
    with locks.claimed(config.out):
        files.expect_files(config.out, "metrics.json", "families.svg")
        provenance.record_run(config.out, config)
        measure(config, model, tokenizer, asked, cards.learned(stages, "data_sets") or ())


def never_trained_on(config: Config, stages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The families that are measured apart: what the model says of its training comes before the flag's default."""
    trained = cards.learned(stages, "families")
    if trained is None:
        return config.held_out_families or HELD_OUT_FAMILIES
    for name in config.held_out_families:
        if name in trained:
            raise InputError(
                f"--held-out-families: found {name!r}, which the model says it was trained on, expected others"
            )
    return tuple(name for name in FAMILIES if name not in trained)


def questions(config: Config) -> list[tuple[str, arc.Task]]:
    """(family or source, task)."""
    families = (*FAMILIES, *(COMPOSITIONS if config.compositions else ()))
    made = arc.generators.held_out(config.sides, families, config.tasks_per_family)
    asked = [(task.id.rpartition("-")[0], task) for task in made]
    for source in config.data:
        known = [task for task in arc.load_tasks(source) if all(pair.output is not None for pair in task.test)]
        asked += [(source, task) for task in known[: config.data_limit]]
    if not asked:
        raise InputError("--data: found no task with a known answer, expected some, or --tasks-per-family above 0")
    return asked


def measure(
    config: Config,
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    asked: list[tuple[str, arc.Task]],
    trained_on: Sequence[str] = (),
) -> None:
    """Asks, marks, and writes what came out."""
    asking = exams.asking_of(model, tokenizer, config.encoder, config.prompt, config.max_new_tokens)
    how: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "slots": config.slots}
    with cli.bar(len(asked), "answering", "tasks") as advance:
        marks = list(exams.examine(model, tokenizer, asked, asking, votes=config.votes, advance=advance, **how))
    results = {"greedy": exams.rates(marks, "greedy")}
    if config.votes > 1:
        results[f"{config.votes} votes"] = exams.rates(marks, "voted")
    if config.random:
        blank = meshes.beside(model, qwen_eqx.Qwen.init(model.config, key=jax.random.key(0), dtype=jnp.float32))
        with cli.bar(len(asked), "random weights", "tasks") as advance:
            drawn = list(exams.examine(blank, tokenizer, asked, asking, votes=1, advance=advance, **how))
        results["random weights"] = exams.rates(drawn, "greedy")
    results |= exams.without_a_model(asked)
    cut = sum(not mark.fits for mark in marks)
    write(config, results, (len(asked), cut), trained_on)


def write(
    config: Config, results: dict[str, dict[str, float]], counts: tuple[int, int], trained_on: Sequence[str]
) -> None:
    """metrics.json, a picture, and a table with means of the families trained on and of those apart."""
    first = next(iter(results.values()))
    count, cut = counts
    procedural = [name for name in first if name in FAMILIES]
    groups = {
        "mean of the trained families": [name for name in procedural if name not in config.held_out_families],
        "mean of the families never trained on": [name for name in procedural if name in config.held_out_families],
        "mean of two rules in turn": [name for name in first if name in COMPOSITIONS],
    }
    means = {
        label: {how: float(np.mean([rates[name] for name in names])) for how, rates in results.items()}
        for label, names in groups.items()
        if names
    }
    files.write_json(
        config.out / "metrics.json", {"tasks": count, "too_long": cut, "means": means, "families": results}
    )
    order = sorted(procedural, key=lambda name: -first[name]) + [name for name in first if name not in FAMILIES]
    table = Table("exact answers", *results, box=figures.SIMPLE_HEAD)
    for name in order:
        apart = " (never trained on)" if name in config.held_out_families else ""
        apart = " (trained on)" if name in trained_on else apart
        table.add_row(name + apart, *(f"{rates[name]:.0%}" for rates in results.values()))
    for label, values in means.items():
        table.add_row(label, *(f"{value:.1%}" for value in values.values()), style="bold")
    cli.console.print(table, soft_wrap=False)
    if cut:
        cli.console.print(f"{cut} test inputs do not fit the model and count as wrong")
    picture = figures.exact_by_family(config.out / "families.svg", results, order)
    cli.console.print(f"by family: {picture}", markup=False)
    cli.console.print(f"saved: {config.out / 'metrics.json'}", markup=False)


if __name__ == "__main__":
    cli.run(main, Config)
