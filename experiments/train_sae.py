"""Train sparse autoencoders on what a model computes while it reads and answers ARC tasks.

Without flags: live on the embedded demo model, about two minutes on a laptop. `--source store --store DIR` replays what
`extract.py` wrote. `--sweep k=8,16,32` trains one for each value on the same activations, and `--sweep k=8,16 lr=1e-3,3e-4`
one for each pair.
"""

import dataclasses
import itertools
import json
import math
from typing import Any

import jax.numpy as jnp

import activations
import arc
import cli
import figures
import qwen_eqx
import sae
from training import Config, Member, Run, name_of

SWEEPABLE = {"k": int, "lr": float, "seed": int, "sparsity": float}


def main(config: Config) -> None:
    check(config)
    members = sweep_members(config)
    source, facts = open_source(config)
    cli.fresh_directory(config.out)
    run = Run.start(config, members, source)
    cli.record_run(config.out, config)
    run.proceed()
    cli.console.print(run.shares())
    results = run.finish(facts)
    cli.write_text(config.out / "metrics.json", json.dumps(results, indent=2) + "\n")
    cli.console.print(figures.metrics_table(results), soft_wrap=False)
    picture = figures.loss_curves(config.out / "loss.svg", run.history, [name_of(member) for member in members])
    cli.console.print(f"loss curve: {picture}", markup=False)
    first = config.out / "sae" if len(members) == 1 else config.out / "sae" / name_of(members[0])
    cli.console.print(f"saved: {config.out / 'sae'} (SAELens directories), {config.out / 'metrics.json'}")
    cli.console.print(f"next: python experiments/evaluate_sae.py --sae {config.out / 'sae'}")
    cli.console.print(f"      python experiments/steer.py --sae {first}")


def check(config: Config) -> None:
    counts = ("limit", "held_out", "max_prompt", "max_new_tokens", "prompts", "d_sae", "k", "steps", "batch_size")
    for name in (*counts, "dead_after", "buffer_rows", "steps_per_call", "checkpoint_every"):
        cli.at_least_one(name, getattr(config, name))
    if not config.lr > 0 or not math.isfinite(config.lr):
        raise sae.InputError(f"--lr: found {config.lr}, expected a finite number above 0")
    if not config.sink_times >= 0:
        raise sae.InputError(f"--sink-times: found {config.sink_times}, expected 0 or more")


def sweep_members(config: Config) -> list[Member]:
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
    members = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for member in members:
        check(dataclasses.replace(config, **member))
    return members


def open_source(config: Config) -> tuple[activations.Source, dict[str, Any]]:
    """The source of groups, and what the saved SAE says of where it was trained."""
    if config.source == "store":
        store = sae.ActivationStore.open(config.store)
        made = store.manifest.config
        site = config.site or store.sites[0]
        if config.layer is not None:
            site = f"blocks.{config.layer}.hook_resid_post"
        source = activations.Stored(store, held_out=config.held_out, site=site, prompts=config.prompts)
        facts = {"model_name": store.manifest.model_id, "revision": store.manifest.revision, "tasks": made.get("tasks")}
    else:
        dtype = jnp.dtype(config.dtype)
        model, tokenizer = qwen_eqx.from_pretrained(config.model, revision=config.revision, dtype=dtype)
        site = activations.site_of(model.config, config.layer, config.site)
        items = activations.read_items(
            list(arc.load_tasks(config.tasks))[: config.limit], config.max_prompt, model.config, tokenizer
        )
        options = {"prompts": config.prompts, "max_new_tokens": config.max_new_tokens}
        source = activations.Live(model, tokenizer, items, held_out=config.held_out, site=site, **options)
        facts = {"model_name": config.model, "revision": config.revision, "tasks": config.tasks}
        if config.model == "tiny-arc":
            cli.console.print("tiny-arc is a demonstration model; --model Qwen/Qwen2.5-0.5B-Instruct loads a real one.")
    cli.console.print(f"{config.form} on {source.site} ({source.d_model} wide) of {facts['model_name']}")
    need = 2 * (config.batch_size * config.steps_per_call + source.largest)
    if config.buffer_rows < need:
        raise sae.InputError(
            f"--buffer-rows: found {config.buffer_rows}, expected at least {need}: twice a call's rows and a group's"
        )
    return source, facts | {"hook_name": source.site, "held_out_tasks": list(source.held_out_tasks)}


if __name__ == "__main__":
    cli.run(main, Config)
