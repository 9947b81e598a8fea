"""Find latents that fire where a plain property of a cell holds, beside controls, and see what removing them does.

Half of the held-out tasks choose thresholds, the other half measure. A property is of the token that is read or of the
next one: its colour, its place in the grid or in an object, the end of a row, the test's answer.
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
from rich.table import Table

import qwen_eqx
import sae
from qwen_lab import (
    bounds,
    cli,
    corpus,
    features,
    figures,
    files,
    flags,
    labels,
    loading,
    locks,
    meshes,
    provenance,
    wording,
)
from qwen_lab.bounds import Count, CountOrNone, Seed, Whole
from qwen_lab.errors import InputError
from qwen_lab.evaluation import Data
from qwen_lab.places import Dictionary
from sae.evaluation import matching


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(loading.OnModel):
    sae: flags.Paths = (loading.EMBEDDED,)
    """SAE directory, file or hub id. A directory that holds several stands for all of them."""
    limit: CountOrNone = 120
    """Tasks to take, from the first; None takes all."""
    max_prompt: flags.MaxPrompt = 1024
    """Prompt tokens at most: whole training pairs are left out to fit; None: what the model holds."""
    best: Count = 20
    """Pairs of a latent and a property that are shown."""
    removed: Whole = 5
    """Of these the first so many latents are removed, each beside a random one that fires as often; 0 for none."""
    seed: Seed = 0
    """Of the run. Controls are drawn from it."""
    out: Path = Path("runs/find_features")
    """Directory of what is written. It is features.json and features.svg."""


def main(config: Config) -> None:
    bounds.check(config)
    given = loading.find(config.sae)
    loaded = {name: sae.load_with_metadata(place) for name, place in given.items()}
    metadata = [one.metadata for one in loaded.values()]
    model, tokenizer, name = config.load_model(metadata)
    dictionaries = [config.dictionary(each, one, model.config) for each, one in loaded.items()]
    for one in dictionaries:
        if one.module.several_sites:
            raise InputError(f"--sae: found {one.name} of several sites, expected one that reads a single site")
    config = wording.filled(config, tokenizer, metadata[0])
    _, tasks = loading.unseen_tasks(metadata[0], config.tasks)
    longest = min(config.max_prompt or model.config.max_seq, model.config.max_seq)
    documents = corpus.documents(
        tasks[: config.limit], tokenizer, max_tokens=longest, encoder=config.encoder, format=config.prompt
    )
    if len({document.task for document in documents}) < 2:
        raise InputError("--limit: found fewer than two tasks that fit, expected two: one chooses, one measures")
    with locks.claimed(config.out):
        files.expect_files(config.out, "run.json", "features.json", "features.svg")
        provenance.record_run(config.out, config)
        report(config, find(config, dictionaries, *read(model, tokenizer, documents, dictionaries, name)))


def read(
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    documents: list[corpus.Document],
    dictionaries: list[Dictionary],
    name: str,
) -> tuple[Data, Data]:
    """What the model computes, and what a model of the same shape with random weights does."""
    places = [one.place for one in dictionaries]
    blank = meshes.beside(model, qwen_eqx.Qwen.init(model.config, key=jax.random.key(0), dtype=jnp.float32))
    reading = cli.progress(documents, len(documents), "reading", "documents")
    data = Data.read(model, tokenizer, reading, places, name)
    return data, Data.read(blank, tokenizer, documents, places, "random weights")


def find(config: Config, dictionaries: list[Dictionary], data: Data, blank: Data) -> dict[str, Any]:
    """Of each dictionary the best pairs, how many properties are matched, and what removing latents does."""
    told = [labels.of_document(document) for document in data.documents]
    halves = features.Halves.of(data.documents)
    results = {}
    for one in cli.progress(dictionaries, len(dictionaries), "matching", "SAEs"):
        found = features.matched(features.codes_of(one, data), told, halves)
        codes = features.controls(one, data, blank, halves, config.seed)
        others = {control: features.matched(code, told, halves) for control, code in codes.items()}
        lines = features.as_rows(found, matching.strongest(found.f1, config.best), others)
        for line in lines[: config.removed] if not one.place.transcodes else []:
            line["removed"] = compare(config, one, data, halves, told, found, line)
        results[one.name] = {
            "site": str(one.place),
            "pairs": lines,
            "properties_over_0.8": int((found.f1.max(axis=0) >= 0.8).sum()),
            "controls_over_0.8": {name: int((each.f1.max(axis=0) >= 0.8).sum()) for name, each in others.items()},
        }
    return results


def compare(
    config: Config,
    dictionary: Dictionary,
    data: Data,
    halves: features.Halves,
    told: list[np.ndarray],
    found: matching.Matches,
    line: dict[str, Any],
) -> dict[str, Any]:
    """The removal of a latent, and that of a random one of about its density."""
    holds = [each[:, labels.NAMES.index(line["property"])] for each in told]
    near = np.argsort(np.abs(found.density - line["density"]))
    near = near[(near != line["latent"]) & (found.density[near] > 0)][:10]
    other = int(np.random.default_rng([config.seed, line["latent"]]).choice(near)) if len(near) else None
    asked = {"latent": line["latent"], "random latent": other}
    return {
        name: dataclasses.asdict(features.removed(data, dictionary, latent, holds, halves.measuring))
        for name, latent in asked.items()
        if latent is not None
    }


def report(config: Config, results: dict[str, Any]) -> None:
    """The table, the picture and the file."""
    files.write_json(config.out / "features.json", results)
    for name, one in results.items():
        controls = list(one["controls_over_0.8"])
        table = Table(
            "latent", "property", "F1", *controls, "removed", title=f"{name}, {one['site']}", box=figures.SIMPLE_HEAD
        )
        for line in one["pairs"]:
            cost = line.get("removed", {})
            said = " / ".join(f"{each['where_it_holds']:.2f}" for each in cost.values())
            beside = [f"{line['controls'][control]:.2f}" for control in controls]
            table.add_row(str(line["latent"]), line["property"], f"{line['f1']:.2f}", *beside, said)
        cli.console.print(table, soft_wrap=False)
        beside = ", ".join(f"{control} {count}" for control, count in one["controls_over_0.8"].items())
        cli.console.print(f"properties with an F1 of at least 0.8: {one['properties_over_0.8']} ({beside})")
    cli.console.print("removed: nats the right next token loses where the property holds, latent / random latent")
    picture = figures.features(config.out / "features.svg", results)
    cli.console.print(f"best latents beside controls: {picture}", markup=False)
    cli.console.print(f"wrote: {config.out / 'features.json'}", markup=False)


if __name__ == "__main__":
    cli.run(main, Config)
