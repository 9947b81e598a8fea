"""Train sparse autoencoders on what a model computes while it reads and answers ARC tasks.

Without flags: live on the embedded demo model, about two minutes on a laptop. `--source store --store DIR` replays what
`extract.py` wrote. `--sweep k=8,16,32` trains one for each value on the same activations, `--sweep layer=1,2,3 k=8,16` one
for each pair, all sites captured in one pass of the model. `--target-site` trains transcoders; in a sweep of several,
`--sweep site=IN:OUT,IN:OUT` names their pairs.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

import arc
import qwen_eqx
import sae
from qwen_lab import cli, figures, places, sources
from qwen_lab.runs import Config, Member, Run

SWEEPABLE = {"k": int, "lr": float, "seed": int, "sparsity": float, "layer": int, "site": str}


def main(config: Config) -> None:
    check(config)
    source, members, facts = open_source(config, combinations(config))
    cli.fresh_directory(config.out)
    run = Run.start(config, members, source)
    cli.record_run(config.out, config)
    run.proceed()
    cli.console.print(run.shares())
    results = run.finish(facts)
    cli.write_text(config.out / "metrics.json", json.dumps(results, indent=2) + "\n")
    cli.console.print(figures.metrics_table(results), soft_wrap=False)
    picture = figures.loss_curves(config.out / "loss.svg", run.history, [member.name for member in members])
    cli.console.print(f"loss curve: {picture}", markup=False)
    first = results[members[0].name]["saved"]
    cli.console.print(f"saved: {config.out / 'sae'} (SAELens directories), {config.out / 'metrics.json'}")
    cli.console.print(f"next: python experiments/evaluate_sae.py --sae {config.out / 'sae'}")
    cli.console.print(f"      python experiments/steer.py --sae {first}")


def check(config: Config) -> None:
    counts = ("limit", "held_out", "max_prompt", "max_new_tokens", "prompts", "d_sae", "k", "steps", "batch_size")
    for name in (*counts, "dead_after", "buffer_rows", "steps_per_call", "checkpoint_every"):
        cli.at_least_one(name, getattr(config, name))
    if not config.lr > 0 or not math.isfinite(config.lr):
        raise sae.InputError(f"--lr: found {config.lr}, expected a finite number above 0")
    if config.bias_rate is not None and not 0 < config.bias_rate < math.inf:
        raise sae.InputError(f"--bias-rate: found {config.bias_rate}, expected a finite number above 0")
    if not config.sink_times >= 0:
        raise sae.InputError(f"--sink-times: found {config.sink_times}, expected 0 or more")


def combinations(config: Config) -> list[dict[str, Any]]:
    """The values of every combination; one empty dict without a sweep."""
    axes: dict[str, list[Any]] = {}
    for axis in config.sweep:
        name, _, values = axis.partition("=")
        try:
            axes[name] = [SWEEPABLE[name](value) for value in values.split(",")]
        except (KeyError, ValueError):
            names = ", ".join(SWEEPABLE)
            raise sae.InputError(f"--sweep: found {axis!r}, expected NAME=value,value with NAME of {names}") from None
        if len(set(axes[name])) != len(axes[name]):
            raise sae.InputError(f"--sweep: found {axis!r}, expected each value once")
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for values in found:
        check(dataclasses.replace(config, **values))
    return found


def make_members(
    config: Config, found: Sequence[dict[str, Any]], known: Callable[[str], str], default: str
) -> list[Member]:
    """One member a combination, named after its place (if that is swept) and its values."""
    members = []
    for values in found:
        each = dataclasses.replace(config, sweep=(), **values)
        place = places.from_flags(known, default, each.layer, each.site, each.target_site)
        parts = [str(place) if name in ("layer", "site") else f"{name}{value:g}" for name, value in values.items()]
        members.append(Member("-".join(parts) or "sae", each, place))
    names = [member.name for member in members]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise sae.InputError(f"--sweep: found {twice} twice, expected each once")
    if len({member.place.transcodes for member in members}) != 1:
        raise sae.InputError("--sweep: found autoencoders and transcoders, expected one kind: they differ in form")
    return members


def open_source(config: Config, found: Sequence[dict[str, Any]]) -> tuple[sources.Source, list[Member], dict[str, Any]]:
    """The source of groups, what to train on them, and what a saved SAE says of where it was trained."""
    if config.source == "store":
        store = sae.ActivationStore.open(config.store)
        members = make_members(config, found, places.in_store(store), store.sites[0])
        source = sources.Stored(store, held_out=config.held_out, sites=sites_of(members), prompts=config.prompts)
        model_name, revision = store.manifest.model_id, store.manifest.revision
        tasks = store.manifest.config.get("tasks")
    else:
        dtype = jnp.dtype(config.dtype)
        model, tokenizer = qwen_eqx.from_pretrained(config.model, revision=config.revision, dtype=dtype)
        members = make_members(config, found, places.in_model(model.config), places.first_late(model.config))
        chosen = list(arc.load_tasks(config.tasks))[: config.limit]
        items = sources.read_items(chosen, config.max_prompt, model.config, tokenizer)
        options = {"prompts": config.prompts, "max_new_tokens": config.max_new_tokens}
        source = sources.Live(model, tokenizer, items, held_out=config.held_out, sites=sites_of(members), **options)
        model_name, revision, tasks = config.model, config.revision, config.tasks
        if config.model == "tiny-arc":
            cli.console.print("tiny-arc is a demonstration model; --model Qwen/Qwen2.5-0.5B-Instruct loads a real one.")
    announce(config, members, model_name)
    need = 2 * (config.batch_size * config.steps_per_call + source.largest)
    if config.buffer_rows < need:
        raise sae.InputError(
            f"--buffer-rows: found {config.buffer_rows}, expected at least {need}: twice a call's rows and a group's"
        )
    facts = {"model_name": model_name, "revision": revision, "tasks": tasks}
    return source, members, facts | {"held_out_tasks": list(source.held_out_tasks)}


def announce(config: Config, members: Sequence[Member], model_name: str) -> None:
    kind = f"{config.form} {'transcoder' if members[0].place.transcodes else 'SAE'}"
    where = ", ".join(dict.fromkeys(str(member.place) for member in members))
    cli.console.print(f"{len(members)} {kind}{'s' * (len(members) > 1)} on {where} of {model_name}")
    if members[0].place.transcodes and config.form in ("topk", "gated"):
        cli.console.print(
            f"SAELens has no {config.form} transcoder and will not open it; --form batchtopk gives one that it opens."
        )


def sites_of(members: Sequence[Member]) -> tuple[str, ...]:
    """Every site that is read or written, once."""
    return tuple(dict.fromkeys(site for member in members for site in (member.place.reads, member.place.writes)))


if __name__ == "__main__":
    cli.run(main, Config)
