"""Trace why a model writes a cell of an answer: a graph from its logits through features back to the examples' cells.

Transcoders stand for the MLPs, and what they miss is kept as errors. Edges are direct linear effects, with attention
patterns and norm scales as they were.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Column, Table

import qwen_eqx
import sae
from qwen_lab import (
    bounds,
    circuits,
    cli,
    corpus,
    figures,
    files,
    flags,
    loading,
    locks,
    meshes,
    provenance,
    stopping,
    wording,
)
from qwen_lab.bounds import Count, CountOrNone, Share, Whole
from qwen_lab.circuits import feature_pages
from qwen_lab.circuits.nodes import FEATURE
from qwen_lab.circuits.puzzles import Question, question, solved
from qwen_lab.errors import InputError

TRANSCODERS = "tiny-arc"
WRITTEN = ("run.json", "graph.safetensors", "graph.json", "neuronpedia.json", "circuit.html")


@dataclasses.dataclass(frozen=True)
class Config(meshes.OnMesh):
    transcoders: str = TRANSCODERS
    """Embedded model's name, or a directory with a transcoder for each MLP."""
    model: str | None = None
    """Embedded name, directory in Hugging Face's layout, or hub id. Without it the model that the transcoders name."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of weights, cache and activations. In bfloat16 the stream is rounded where the graph is not."""
    tasks: str | None = None
    """Data set (arc-agi-1|2/training|evaluation, procedural), directory of {id}.json, Kaggle challenges file, or JSONL.
    Without it the transcoders' own held-out tasks, or the evaluation set of ARC-AGI-1."""
    task: str | None = None
    """Id of the puzzle. Without it the first that the model solves."""
    row: Whole | None = None
    """Row of the answer's cell, from 0. Without it that of the first cell in a colour that is not the commonest."""
    col: Whole | None = None
    """Column of the cell."""
    encoder: str = wording.AUTO
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal)). auto: as trained."""
    prompt: str = wording.AUTO
    """Prompt format: a name of arc.PROMPTS. auto: as trained."""
    max_prompt: flags.MaxPrompt = 1024
    """Prompt tokens at most: whole training pairs are left out to fit; None: what the model holds."""
    max_features: CountOrNone = 1024
    """Features whose inputs are traced, those of most influence first; None traces all that have any."""
    batch: Count = 64
    """Targets of one sweep through the model: memory grows with it, results do not change."""
    nodes: Share = 0.8
    """Share of the influence that the nodes on the page make up."""
    hold: flags.Words = ()
    """Nodes of the graph held at a value, such as 3_766_200=0, to see what the model says then: features at an activation,
    errors (3_-1_200) and tokens (E_17_200) at a factor. Without it the eight strongest features are silenced."""
    edges: Share = 0.98
    """Share of what passes between these nodes that the edges on the page make up."""
    pages: Whole = 12
    """Held-out puzzles on which the page of each feature shows what it fires on; 0: no such pages."""
    out: Path = Path("runs/trace_circuit")
    """Directory of what is written. It is the graph, Neuronpedia's JSON of it, circuit.html and pages of features."""


def main(config: Config) -> None:
    bounds.check(config)
    held = holding(config.hold)
    transcoders = sae.load_transcoders(config.transcoders)
    name = config.model or str(transcoders.metadata.get("model_name", wording.MODEL))
    model, tokenizer = config.open_model(name, config.dtype, config.revision)
    config = wording.filled(config, tokenizer, transcoders.metadata)
    documents, asked = ask(config, transcoders, model, tokenizer)
    with locks.claimed(config.out):
        files.expect_files(config.out, *WRITTEN)
        provenance.record_run(config.out, config)
        options = circuits.Options(max_features=config.max_features, batch=config.batch)
        with cli.bar(config.max_features, "tracing", "rows") as advance:

            def found(rows: int) -> None:
                advance(rows)
                stopping.check()

            graph = circuits.trace(model, tokenizer, transcoders, asked.tokens, options, found)
        cell = f"{asked.document.task}, the answer's cell at row {asked.cell.row}, column {asked.cell.col}"
        said = {"model": name, "transcoders": config.transcoders, "what": cell}
        shown = documents[: config.pages]
        said |= {"pages": feature_pages.ADDRESS} if shown else {}
        graph = dataclasses.replace(graph, facts=graph.facts | said, grids=asked.grids)
        small = graph.prune(config.nodes, config.edges)
        names = report(config, graph, small)
        if shown:
            feature_pages.write(config.out, small, model, tokenizer, transcoders, shown)
        held = held or dict.fromkeys(names, 0.0)
        show(tokenizer, circuits.intervene(model, transcoders, graph, held), held)
        cli.console.print(f"wrote: {config.out / 'circuit.html'}, graph.json, neuronpedia.json", markup=False)
        cli.console.print("next: open circuit.html; another cell with --row and --col, another puzzle with --task")


def ask(
    config: Config, transcoders: sae.Transcoders, model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer
) -> tuple[list[corpus.Document], Question]:
    """All puzzles that fit, and of the one asked for or the first that is solved all up to the cell."""
    source, tasks = loading.unseen_tasks(transcoders.metadata, config.tasks)
    if config.task is not None and config.task not in [task.id for task in tasks]:
        raise InputError(f"--task: found no {config.task!r} in {source}, expected one of its tasks")
    most = min(config.max_prompt or model.config.max_seq, model.config.max_seq)
    documents = corpus.documents(tasks, tokenizer, max_tokens=most, encoder=config.encoder, format=config.prompt)
    found = solved(model, [each for each in documents if config.task in (None, each.task)])
    if found is None:
        raise InputError(f"--task: found no puzzle of {source} that the model solves, expected one; name others")
    return documents, question(found, config.row, config.col)


def holding(words: tuple[str, ...]) -> dict[str, float]:
    """Name of a feature's node -> the value it is held at."""
    held = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            held[name] = float(value)
        except ValueError:
            raise InputError(
                f"--hold: found {word!r}, expected a node's name and a number, such as 3_766_200=0"
            ) from None
    return held


def show(tokenizer: qwen_eqx.Tokenizer, outcome: circuits.Outcome, held: Mapping[str, float]) -> None:
    """What the answer's logit and the answer become."""
    said, frozen, free = outcome.answers
    rows = {"as it is": outcome.plain, "all else frozen": outcome.frozen, "the model goes on": outcome.free}
    table = Table(
        "", "says", *(Column(f"logit of {tokenizer.decode([said])!r}", justify="right"),), box=figures.SIMPLE_HEAD
    )
    for (name, logits), token in zip(rows.items(), (said, frozen, free), strict=True):
        table.add_row(name, repr(tokenizer.decode([token])), f"{logits[said]:.2f}")
    cli.console.print(f"held: {', '.join(f'{name}={value:g}' for name, value in held.items())}", markup=False)
    cli.console.print(table, soft_wrap=False)


def report(config: Config, graph: circuits.Graph, small: circuits.Graph) -> list[str]:
    """The files, and what leads to the answer in a few lines; the names of the strongest features."""
    graph.save(config.out)
    small.neuronpedia(config.out / "neuronpedia.json", slug=config.out.name)
    small.page(config.out / "circuit.html", f"Why the model says {_answer(graph)!r} here")
    facts, nodes = graph.facts, small.nodes
    cli.console.print(f"{facts['what']}: the model says {_answer(graph)!r}", markup=False)
    cli.console.print(
        f"{facts['active_features']:,} features fire, {facts['traced_features']:,} are traced, "
        f"{np.sum(nodes.kind == FEATURE):,} and {len(small.edges):,} edges left after pruning"
    )
    cli.console.print(
        f"replacement {facts['replacement_score']:.2f}, completeness {facts['completeness_score']:.2f} (best: 1)"
    )
    table = Table(
        *("feature", Column("at"), Column("influence", justify="right")), title="strongest", box=figures.SIMPLE_HEAD
    )
    ranked = [n for n in np.argsort(-nodes.influence, kind="stable") if nodes.kind[n] == FEATURE][:8]
    for n in ranked:
        piece = f"{nodes.position[n]} {small.pieces[nodes.position[n]]!r}"
        table.add_row(f"layer {nodes.layer[n]}, {nodes.index[n]}", piece, f"{nodes.influence[n]:.3f}")
    cli.console.print(table, soft_wrap=False)
    return [nodes.ids[n] for n in ranked]


def _answer(graph: circuits.Graph) -> str:
    return next(iter(graph.facts["logit_tokens"].values()))


if __name__ == "__main__":
    cli.run(main, Config)
