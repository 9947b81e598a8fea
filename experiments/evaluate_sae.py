"""Measure sparse autoencoders on ARC tasks: reconstruction, sparsity, what the model loses, and what each latent fires on.

`--sae` takes any SAE that `sae.load` reads: a directory of `train_sae.py` or SAELens, another team's files, a hub id; or
a directory that holds several, which are then compared. Without --tasks the tasks its training held out are used.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import activations
import arc
import cli
import figures
import pages
import qwen_eqx
import sae
import splicing
from sae import metrics

POSITIONS = (0, 1, 4, 16, 64, 256, 1024, 4096)  # where each group of positions starts


@dataclasses.dataclass(frozen=True)
class Config:
    sae: tuple[str, ...] = ("runs/train_sae/sae",)
    """SAEs to evaluate: directories, files, hub ids, or directories that hold several."""
    k: int | None = None
    """Latents kept, for Qwen-Scope files whose path does not name it."""
    model: str | None = None
    """Embedded name, directory or hub id; without it the model that the SAE names."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the model."""
    layer: int | None = None
    """Residual stream after this block; without it the site that the SAE names."""
    site: str | None = None
    """Any other place, as TransformerLens or Hugging Face spell it."""
    tasks: str | None = None
    """Data set; without it the SAE's own held-out tasks, or the evaluation set of ARC-AGI-1."""
    limit: int = 20
    """Tasks to take at most."""
    max_tokens: int = 1024
    """Tokens of a document: training pairs are left out to fit, and inputs that cannot fit are skipped."""
    encoder: str = arc.DEFAULT_ENCODER
    """How grids become text."""
    prompt: str = arc.DEFAULT_PROMPT
    """Prompt format."""
    sink_times: float = 10.0
    """Leave positions whose norm exceeds this many medians (attention sinks) out of reconstruction; 0 keeps all."""
    latents: int = 40
    """Latents in the report, spread over all densities."""
    examples: int = 4
    """Documents shown for each."""
    out: Path = Path("runs/evaluate_sae")
    """Directory of the table, pictures and reports."""


def main(config: Config) -> None:
    for name in ("limit", "max_tokens", "latents", "examples"):
        cli.at_least_one(name, getattr(config, name))
    if not config.sink_times >= 0:
        raise sae.InputError(f"--sink-times: found {config.sink_times}, expected 0 or more")
    loaded = {name: sae.load_with_metadata(source, k=config.k) for name, source in sources(config.sae).items()}
    names = {str(one.metadata.get("model_name", "tiny-arc")) for one in loaded.values()}
    if config.model is None and len(names) != 1:
        raise sae.InputError(f"--sae: found SAEs of {', '.join(sorted(names))}, expected one model's, or --model")
    model, tokenizer = qwen_eqx.from_pretrained(
        config.model or names.pop(), revision=config.revision, dtype=jnp.dtype(config.dtype)
    )
    found = read_documents(config, [one.metadata for one in loaded.values()], tokenizer)
    cli.fresh_directory(config.out)
    cli.record_run(config.out, config)
    results = {}
    for name, one in cli.progress(loaded.items(), len(loaded), "evaluating", "SAEs"):
        where = config.out / name if len(loaded) > 1 else config.out
        where.mkdir(exist_ok=True, parents=True)
        results[name] = evaluate(config, one, model, tokenizer, found, where, name)
    cli.write_text(config.out / "metrics.json", json.dumps(results, indent=2) + "\n")
    cli.console.print(figures.metrics_table(results, f"{len(found)} documents of {len({d.task for d in found})} tasks"))
    for name, row in results.items():
        cli.console.print(
            f"{name}: with its error term spliced in, the largest change of a logit is {row['identity']:g}"
        )
    if len(results) > 1:
        note = f"{next(iter(results.values()))['site']}, {len({d.task for d in found})} held-out tasks"
        picture = figures.frontier(config.out / "fvu_l0.svg", results, note)
        cli.console.print(f"FVU against L0: {picture}", markup=False)
    reports = sorted(str(path) for path in config.out.glob("**/report.html"))
    cli.console.print(f"wrote: {config.out / 'metrics.json'}, {reports[0]}{' …' if len(reports) > 1 else ''}")
    cli.console.print(
        f"next: open {reports[0]}, then python experiments/steer.py --sae {results[min(results)]['source']}"
    )


def sources(given: Sequence[str]) -> dict[str, str]:
    """Short name -> place; a directory that holds SAEs stands for all of them."""
    found = []
    for place in given:
        inside = sorted(str(path.parent) for path in Path(place).glob("**/cfg.json")) if Path(place).is_dir() else []
        found += inside if len(inside) > 1 or (inside and inside != [place]) else [place]
    parts = [Path(place).parts for place in found]
    shared = 0
    while len(found) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    names = ["-".join(p for p in part[shared if len(found) > 1 else -1 :] if p != "sae") or "sae" for part in parts]
    if len(set(names)) != len(names):
        raise sae.InputError(f"--sae: found {', '.join(given)}, expected each SAE once")
    return dict(zip(names, found, strict=True))


def read_documents(
    config: Config, metadata: Sequence[dict[str, Any]], tokenizer: qwen_eqx.Tokenizer
) -> list[pages.Document]:
    """Documents of tasks that none of the SAEs was trained on, where they say so."""
    held_out = [one.get("held_out_tasks") for one in metadata]
    agree = all(one == held_out[0] for one in held_out)
    chosen = pages.unseen_tasks(metadata[0] if agree else {}, config.tasks)[: config.limit]
    return pages.documents(chosen, tokenizer, max_tokens=config.max_tokens, encoder=config.encoder, form=config.prompt)


def evaluate(
    config: Config,
    loaded: sae.Loaded,
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    found: list[pages.Document],
    where: Path,
    name: str,
) -> dict[str, Any]:
    """All metrics of one SAE; pictures and the report go to `where`."""
    module, metadata = loaded.module, loaded.metadata
    site = splicing.site_of(model.config, module, metadata, config.layer, config.site)
    acts = [splicing.activation(model, document.tokens, site) for document in found]
    total, groups = reconstruct(module, found, acts, config.sink_times)
    result = {"source": sources(config.sae)[name], "form": form_of(module), "site": site, "d_sae": module.d_sae}
    result |= metrics.summary(total) | splicing.recovered(model, module, [d.tokens for d in found], site)
    counts, edges = metrics.density_histogram(total)
    dead = int(np.sum(metrics.density(total) == 0))
    figures.densities(where / "densities.svg", counts, edges, dead)
    figures.breakdown(where / "breakdown.svg", groups)
    result |= {"dead": dead, "density_histogram": {"counts": counts.tolist(), "log10_edges": edges.tolist()}, **groups}
    codes = [np.asarray(module.encode(x)) for x in acts]
    survey = sae.Survey.take(codes, d_sae=module.d_sae, examples=config.examples)
    chosen = survey.choose(config.latents)
    facts = {
        "model": str(config.model or metadata.get("model_name")),
        "site": site,
        "SAE": f"{result['form']}, {module.d_sae:,} latents, {name}",
        "documents": f"{len(found)} of {len({d.task for d in found})} tasks, {survey.tokens:,} tokens",
        **{figures.COLUMNS[key]: f"{result[key]:.4g}" for key in figures.COLUMNS},
    }
    shown = pages.latents(module, survey, found, codes, model, tokenizer, chosen)
    sae.report.write(where / "report.html", f"Latents of {name}", shown, facts=facts, density=survey.density)
    return result


def reconstruct(
    module: sae.AbstractSAE, found: list[pages.Document], acts: list[jax.Array], sink_times: float
) -> tuple[metrics.Totals, dict[str, dict[str, dict[str, float]]]]:
    """The totals of all rows, and each metric by position and by task."""
    rows = jnp.concatenate(acts)
    whole = activations.Group(rows, jnp.ones(rows.shape[0], bool))
    keep = np.flatnonzero(np.asarray(activations.wanted(whole, sink_times)))
    lengths = [len(document.tokens) for document in found]
    place = np.concatenate([np.arange(length) for length in lengths])
    tasks = list(dict.fromkeys(document.task for document in found))
    task = np.repeat([tasks.index(document.task) for document in found], lengths)
    rows, mean = rows[keep], jnp.mean(rows[keep].astype(jnp.float32), axis=0)
    starts = [f"{start}+" for start in POSITIONS]
    by_position = _totals(module, rows, mean, np.searchsorted(POSITIONS, place[keep], "right") - 1, len(POSITIONS))
    by_task = _totals(module, rows, mean, task[keep], len(tasks))
    return by_task, {"position": _named(by_position, starts), "task": _named(by_task, tasks)}


def _totals(module: sae.AbstractSAE, rows: jax.Array, mean: jax.Array, group: np.ndarray, groups: int) -> Any:
    parts = zip(activations.batches_of(rows), activations.batches_of(jnp.asarray(group, jnp.int32)), strict=True)
    found = [metrics.totals(module, x, mean, of, groups) for x, of in parts]
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
