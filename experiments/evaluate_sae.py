"""Measure sparse autoencoders on ARC tasks: reconstruction, sparsity, what the model loses, and what each latent fires on.

`--sae` takes any SAE that `sae.load` reads: a directory of `train_sae.py` or SAELens, another team's files, a hub id; or
a directory that holds several, which are then compared. Without --tasks the tasks its training held out are used.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qwen_eqx
import sae
from qwen_lab import cli, figures, pages, places, sources, splicing
from sae.evaluation import metrics

POSITIONS = (0, 1, 4, 16, 64, 256, 1024, 4096)  # where each group of positions starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(splicing.OnModel):
    sae: tuple[str, ...] = ("runs/train_sae/sae",)
    """SAEs to evaluate: directories, files, hub ids, or directories that hold several."""
    k: int | None = None
    """Latents kept, for Qwen-Scope files whose path does not name it."""
    limit: int = 20
    """Tasks to take at most."""
    max_tokens: int = 1024
    """Tokens of a document: training pairs are left out to fit, and inputs that cannot fit are skipped."""
    sink_times: float = 10.0
    """Leave positions whose norm exceeds this many medians (attention sinks) out of reconstruction; 0 keeps all."""
    latents: int = 40
    """Latents in the report, spread over all densities."""
    examples: int = 4
    """Documents shown for each."""
    out: Path = Path("runs/evaluate_sae")
    """Directory of the table, pictures and reports."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What all SAEs are measured on: documents, and what the model computes at every site while it reads them."""

    model: qwen_eqx.Qwen
    tokenizer: qwen_eqx.Tokenizer
    model_name: str
    documents: list[pages.Document]
    acts: list[dict[str, jax.Array]]

    def at(self, site: str) -> list[jax.Array]:
        return [values[site] for values in self.acts]


def main(config: Config) -> None:
    for name in ("limit", "max_tokens", "latents", "examples"):
        cli.at_least_one(name, getattr(config, name))
    if not config.sink_times >= 0:
        raise sae.InputError(f"--sink-times: found {config.sink_times}, expected 0 or more")
    given = find_saes(config.sae)
    loaded = {name: sae.load_with_metadata(source, k=config.k) for name, source in given.items()}
    metadata = [one.metadata for one in loaded.values()]
    model, tokenizer, model_name = config.load_model(metadata)
    where = {name: config.place(model.config, one.module, one.metadata) for name, one in loaded.items()}
    documents = read_documents(config, metadata, tokenizer)
    cli.fresh_directory(config.out)
    cli.record_run(config.out, config)
    sites = [site for place in where.values() for site in (place.reads, place.writes)]
    reading = cli.progress(documents, len(documents), "reading", "documents")
    acts = [splicing.captured(model, document.tokens, sites) for document in reading]
    data = Data(model, tokenizer, model_name, documents, acts)
    results: dict[str, dict[str, Any]] = {}
    for name, one in cli.progress(loaded.items(), len(loaded), "evaluating", "SAEs"):
        out = config.out / name if len(loaded) > 1 else config.out
        results[name] = {"source": given[name]} | evaluate(config, one.module, where[name], data, out, name)
    cli.write_text(config.out / "metrics.json", json.dumps(results, indent=2) + "\n")
    tasks = len({document.task for document in documents})
    cli.console.print(figures.metrics_table(results, f"{len(documents)} documents of {tasks} tasks"), soft_wrap=False)
    identity = max(row["identity"] for row in results.values())
    cli.console.print(f"with the error term spliced in too, the largest change of a logit is {identity:g}")
    if len(results) > 1:
        note = f"{tasks} held-out tasks" if config.tasks is None else f"{tasks} tasks of {config.tasks}"
        picture = figures.frontier(config.out / "fvu_l0.svg", results, note)
        cli.console.print(f"FVU against L0: {picture}", markup=False)
    first = next(iter(results))
    report = (config.out / first if len(results) > 1 else config.out) / "report.html"
    cli.console.print(f"wrote: {config.out / 'metrics.json'}, {report}{' …' if len(results) > 1 else ''}")
    cli.console.print(f"next: open {report}, then python experiments/steer.py --sae {given[first]}")


def find_saes(given: Sequence[str]) -> dict[str, str]:
    """Short name -> place; a directory that holds SAEs stands for all of them."""
    found = []
    for place in given:
        inside = sorted(map(str, (path.parent for path in Path(place).glob("**/cfg.json"))), key=_numbers_as_such)
        found += inside if len(inside) > 1 or (inside and inside != [place]) else [place]
    parts = [Path(place).parts for place in found]
    shared = 0
    while len(found) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    names = ["-".join(p for p in part[shared if len(found) > 1 else -1 :] if p != "sae") or "sae" for part in parts]
    if len(set(names)) != len(names):
        raise sae.InputError(f"--sae: found {', '.join(given)}, expected each SAE once")
    return dict(zip(names, found, strict=True))


def _numbers_as_such(text: str) -> list[tuple[int, str]]:
    """k4 before k16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def read_documents(
    config: Config, metadata: Sequence[dict[str, Any]], tokenizer: qwen_eqx.Tokenizer
) -> list[pages.Document]:
    """Documents of tasks that none of the SAEs was trained on, where they say so."""
    held_out = [one.get("held_out_tasks") for one in metadata]
    agree = all(one == held_out[0] for one in held_out)
    chosen = pages.unseen_tasks(metadata[0] if agree else {}, config.tasks)[: config.limit]
    options = {"max_tokens": config.max_tokens, "encoder": config.encoder, "format": config.prompt}
    found = pages.documents(chosen, tokenizer, **options)
    if left := len(chosen) - len({document.task for document in found}):
        cli.console.print(f"{left} of {len(chosen)} tasks left out: longer than --max-tokens {config.max_tokens}")
    return found


def evaluate(
    config: Config, module: sae.AbstractSAE, place: places.Place, data: Data, out: Path, name: str
) -> dict[str, Any]:
    """All metrics of one SAE; pictures and the report go to `out`."""
    out.mkdir(exist_ok=True, parents=True)
    found, acts = data.documents, data.at(place.reads)
    total, groups = reconstruct(module, found, acts, data.at(place.writes), config.sink_times)
    result = {"form": form_of(module), "site": str(place), "d_sae": module.d_sae}
    result |= metrics.summary(total) | splicing.recovered(data.model, module, [d.tokens for d in found], place)
    counts, edges = metrics.density_histogram(total)
    dead = int(np.sum(metrics.density(total) == 0))
    figures.densities(out / "densities.svg", counts, edges, dead)
    figures.breakdown(out / "breakdown.svg", groups)
    result |= {"dead": dead, "density_histogram": {"counts": counts.tolist(), "log10_edges": edges.tolist()}, **groups}
    codes = (splicing.encoded(module, x) for x in acts)
    survey = sae.Survey.take(codes, d_sae=module.d_sae, examples=config.examples)
    chosen = survey.choose(config.latents)
    codes = [splicing.encoded(module, x)[:, chosen] for x in acts]  # again: of all latents they may not fit
    facts = {
        "model": data.model_name,
        "site": str(place),
        "SAE": f"{result['form']}, {module.d_sae:,} latents, {name}",
        "documents": f"{len(found)} of {len({d.task for d in found})} tasks, {survey.tokens:,} tokens",
        **figures.written(result),
    }
    shown = pages.latents(module, survey, found, codes, data.model, data.tokenizer, chosen)
    sae.report.write(out / "report.html", f"Latents of {name}", shown, facts=facts, density=survey.density)
    return result


def reconstruct(
    module: sae.AbstractSAE,
    found: list[pages.Document],
    read: list[jax.Array],
    written: list[jax.Array],
    sink_times: float,
) -> tuple[metrics.Totals, dict[str, dict[str, dict[str, float]]]]:
    """The totals of all rows, and each metric by position and by task."""
    x, y = jnp.concatenate(read), jnp.concatenate(written)
    wanted = [sources.wanted(sources.Group.of(rows), sink_times) for rows in (x, y)]
    keep = np.flatnonzero(np.asarray(wanted[0] & wanted[1]))
    lengths = [len(document.tokens) for document in found]
    position = np.concatenate([np.arange(length) for length in lengths])
    tasks = list(dict.fromkeys(document.task for document in found))
    task = np.repeat([tasks.index(document.task) for document in found], lengths)
    starts = [f"{start}+" for start in POSITIONS]
    by_position = np.searchsorted(POSITIONS, position[keep], "right") - 1
    totals = [
        _totals(module, x[keep], y[keep], group, count)
        for group, count in ((by_position, len(POSITIONS)), (task[keep], len(tasks)))
    ]
    return totals[1], {"position": _named(totals[0], starts), "task": _named(totals[1], tasks)}


def _totals(module: sae.AbstractSAE, x: jax.Array, y: jax.Array, group: np.ndarray, groups: int) -> metrics.Totals:
    mean = jnp.mean(y.astype(jnp.float32), axis=0)
    parts = zip(*map(sources.batches_of, (x, y, jnp.asarray(group, jnp.int32))), strict=True)
    found = [metrics.totals(module, rows, mean, of, groups, target) for rows, target, of in parts]
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *found)


def _named(total: metrics.Totals, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics of each group that has rows."""
    columns = metrics.by_group(total)
    rows = {name: {key: float(column[at]) for key, column in columns.items()} for at, name in enumerate(names)}
    return {name: row for name, row in rows.items() if row["rows"] and np.isfinite(row["fvu"])}


def form_of(module: sae.AbstractSAE) -> str:
    return next(name for name, form in sae.FORMS.items() if type(module) is form)


if __name__ == "__main__":
    cli.run(main, Config)
