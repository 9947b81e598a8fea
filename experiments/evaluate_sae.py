"""Measure sparse autoencoders on ARC tasks: reconstruction, sparsity, what the model loses, and what each latent fires on.

`--sae` takes any SAE that `sae.load` reads: a directory of `train_sae.py` or SAELens, another team's files, a hub id; or
a directory that holds several, which are then compared. Without --tasks the tasks its training held out are used.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qwen_eqx
import sae
from qwen_lab import (
    bounds,
    cli,
    corpus,
    dashboards,
    evaluation,
    figures,
    files,
    flags,
    loading,
    locks,
    pages,
    prompts,
    provenance,
    splicing,
    texts,
    timelines,
    watching,
    wording,
)
from qwen_lab.bounds import Count, CountOrNone, Times, Whole
from qwen_lab.corpus import Document
from qwen_lab.errors import InputError
from qwen_lab.evaluation import Data
from qwen_lab.places import Dictionary
from qwen_lab.prompts import Item
from qwen_lab.texts import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(loading.OnModel):
    sae: flags.Paths = (loading.EMBEDDED,)
    """SAE directory, file or hub id. A list of them, or a directory that holds several, is compared."""
    k: CountOrNone = None
    """Latents that fire per position. For Qwen-Scope files whose path does not name it."""
    limit: CountOrNone = 20
    """Tasks to take, from the first; None takes all."""
    max_prompt: flags.MaxPrompt = 1024
    """Prompt tokens at most: whole training pairs are left out to fit; None: what the model holds. Answers count too."""
    sink_times: Times = 10.0
    """Leave out positions whose norm exceeds this many medians (attention sinks); 0 keeps all. Of reconstruction alone."""
    examples: Count = 4
    """Documents shown of each latent, those where it is strongest; three from the rest of its range come with them."""
    answered: Whole = 20
    """Documents that the model answers, from the first; 0: none, and nothing is steered."""
    steered: Whole = 24
    """Latents, spread over all densities, whose direction is added while the model answers one of these again; 0: none."""
    augmented: Whole = 8
    """Documents whose tasks are read turned, recoloured and reordered, to see what stays of each latent; 0: none."""
    timelines: Whole = 3
    """Answers that get a page which shows them being computed; of the first tasks. 0: none."""
    neuronpedia: bool = False
    """Also write every latent that fires as SAEDashboard's JSON, which Neuronpedia imports, into OUT/neuronpedia."""
    out: Path = Path("runs/evaluate_sae")
    """Directory of what is written. Table, pictures and the gallery of all latents."""


def check(config: Config) -> None:
    """Raises for flags that no run can have."""
    bounds.check(config)
    if not config.sink_times >= 0:
        raise InputError(f"--sink-times: found {config.sink_times}, expected 0 or more")


def main(config: Config) -> None:
    check(config)
    given = loading.find(config.sae)
    loaded = {name: sae.load_with_metadata(source, k=config.k) for name, source in given.items()}
    model, tokenizer, model_name = config.load_model([one.metadata for one in loaded.values()])
    dictionaries = [config.dictionary(name, one, model.config) for name, one in loaded.items()]
    read = read_documents(config, dictionaries, model, tokenizer, model_name)
    with locks.claimed(config.out):
        measure(config, model, tokenizer, dictionaries, read, given)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What the SAEs are measured on."""

    text: Text
    documents: list[Document]
    items: list[Item]  # what the model is watched answering
    tasks_asked: int
    tasks_read: int

    def rows_of(self, rows: float) -> str:
        """Which rows the metrics are of."""
        tasks = f"{self.tasks_read} of {self.tasks_asked} tasks"
        return f"{rows:,.0f} rows of {len(self.documents)} documents of {tasks}: prompts with their right answers"


def measure(
    config: Config,
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    dictionaries: list[Dictionary],
    read: Corpus,
    given: dict[str, str],
) -> None:
    """Reads the documents once, and writes all that is found of each SAE."""
    files.fresh_directory(config.out / "features")
    files.expect_files(config.out, "run.json", "metrics.json", "replacement.json")
    provenance.record_run(config.out, config)
    reading = cli.progress(read.documents, len(read.documents), "reading", "documents")
    data = Data.read(model, tokenizer, reading, [one.place for one in dictionaries], read.text.model or "")
    results: dict[str, dict[str, Any]] = {}
    for one in cli.progress(dictionaries, len(dictionaries), "evaluating", "SAEs"):
        out = config.out / one.name if len(dictionaries) > 1 else config.out
        scores = evaluate(config, one, data, out)
        said = {"source": given[one.name], "text": texts.compared(read.text, Text.of_metadata(one.metadata))}
        results[one.name] = {**said, "rows_of": read.rows_of(scores["rows"]), **scores}
    files.write_json(config.out / "metrics.json", results)
    watch(config, model, tokenizer, dictionaries, read)
    for one in dictionaries if config.neuronpedia else ():
        where = config.out / "neuronpedia" / one.name if len(dictionaries) > 1 else config.out / "neuronpedia"
        written = dashboards.write(where, one, data, config.examples)
        cli.console.print(f"for Neuronpedia: {len(written)} files in {where}", markup=False)
    replace(config, data, dictionaries)
    detail = pages.Detail(config.examples, config.answered, config.steered, config.augmented)
    cli.console.print("what each latent fires on: painting", markup=False)
    page = pages.write_gallery(config.out / "features", dictionaries, data, detail=detail, scores=results)
    report(config, data, results, page)


def watch(
    config: Config, model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, dictionaries: list[Dictionary], read: Corpus
) -> None:
    """A page for each answer of the first tasks, with what the latents did while the model wrote it."""
    if not read.items:
        return
    tasks = config.out / "features" / "tasks"
    for number, watched in enumerate(watching.watch(model, tokenizer, dictionaries, read.items)):
        one, up = dictionaries[number], "../" if number else ""
        others = {
            each.name: f"{up}{at}/index.html" if at else f"{up}index.html" for at, each in enumerate(dictionaries)
        }
        timelines.write(
            tasks / str(number) if number else tasks,
            watched,
            title=f"Answers, and what {one.name} sees in them",
            facts={"model": read.text.model or "", "site": str(one.place), "SAE": one.name},
            links={"all latents": f"{up}../index.html", **(others if len(others) > 1 else {})},
            names=watching.named(model, tokenizer, one, watched),
            latent_page=f"{up}../index.html#/{number}/{{latent}}",
        )
    cli.console.print(f"answers being computed: {tasks / 'index.html'}", markup=False)


def replace(config: Config, data: Data, dictionaries: Sequence[Dictionary]) -> None:
    """Where transcoders of all MLPs are among them: what the model loses with these as its MLPs."""
    documents = [document.tokens for document in data.documents]
    sets = splicing.replacing(data.model.config, dictionaries)
    if not sets:
        return
    scores = {
        name: splicing.replaced(data.model, each, documents)
        for name, each in cli.progress(list(sets.items()), len(sets), "replacing all MLPs", "sets")
    }
    files.write_json(config.out / "replacement.json", scores)
    for name, found in scores.items():
        shares = f"{found['ce_recovered']:.1%} of the cross-entropy and {found['kl_recovered']:.1%} of the KL"
        cli.console.print(
            f"in place of all MLPs ({name}): {shares} recovered, each reading what those before it left", markup=False
        )


def evaluate(config: Config, dictionary: Dictionary, data: Data, out: Path) -> dict[str, Any]:
    """All metrics of one SAE; pictures go to `out`."""
    out.mkdir(exist_ok=True, parents=True)
    scores = evaluation.evaluate(dictionary, data, config.sink_times)
    counts, edges = (np.asarray(values) for values in scores["density_histogram"].values())
    figures.densities(out / "densities.svg", counts, edges, scores["dead"])
    figures.breakdown(out / "breakdown.svg", {by: scores[by] for by in ("position", "task")})
    return scores


def report(config: Config, data: Data, results: dict[str, dict[str, Any]], page: Path) -> None:
    """The table, the picture of several, where everything lies and what comes next."""
    tasks = len(data.tasks)
    table = figures.metrics_table(results, f"{len(data.documents)} documents of {tasks} tasks")
    cli.console.print(table, soft_wrap=False)
    rows_of = next(iter(results.values()))["rows_of"]
    cli.console.print(f"these are of {rows_of}; train_sae.py's are of what the model wrote after all held-out prompts")
    identity = max(row["identity"] for row in results.values())
    cli.console.print(f"with the error term spliced in too, the largest change of a logit is {identity:g}")
    if len(results) > 1:
        note = f"{tasks} held-out tasks" if config.tasks is None else f"{tasks} tasks of {config.tasks}"
        picture = figures.frontier(config.out / "fvu_l0.svg", results, note)
        cli.console.print(f"FVU against L0: {picture}", markup=False)
    row = next(iter(results.values()))
    cli.console.print(f"wrote: {config.out / 'metrics.json'}, {page}", markup=False)
    cli.console.print(f"next: open {page}, then python experiments/steer.py --sae {row['source']}", markup=False)


def read_documents(
    config: Config,
    dictionaries: Sequence[Dictionary],
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    model_name: str,
) -> Corpus:
    """Documents of tasks that none of the SAEs was trained on, where they say so; other text than theirs is said first."""
    held_out = [one.metadata.get("held_out_tasks") for one in dictionaries]
    agree = all(one == held_out[0] for one in held_out)
    metadata = dictionaries[0].metadata if agree else {}
    config = wording.filled(config, tokenizer, metadata)
    name, tasks = loading.unseen_tasks(metadata, config.tasks)
    tasks = tasks[: config.limit]
    text = Text(model_name, name, config.encoder, config.prompt, f"sha256:{tokenizer.digest}")
    for line in texts.warnings(text, {one.name: Text.of_metadata(one.metadata) for one in dictionaries}):
        cli.console.print(line, markup=False)
    longest = min(config.max_prompt or model.config.max_seq, model.config.max_seq)
    options = {"max_tokens": longest, "encoder": config.encoder, "format": config.prompt}
    documents = corpus.documents(tasks, tokenizer, **options)
    read = len({document.task for document in documents})
    if left := len(tasks) - read:
        cli.console.print(f"{left} of {len(tasks)} tasks left out: longer than {longest} tokens (--max-prompt)")
    items = []
    if config.timelines:
        asking = prompts.asking(tokenizer, budget=longest, encoder=config.encoder, format=config.prompt)
        chosen = {document.task for document in documents[: config.timelines]}
        items = prompts.items([task for task in tasks if task.id in chosen], tokenizer, asking, too_long="skip")
    return Corpus(text, documents, items[: config.timelines], len(tasks), read)


if __name__ == "__main__":
    cli.run(main, Config)
