"""From a config to trained dictionaries: the source opened, the members made, the run taken to its end."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax.sharding import Mesh

import qwen_eqx
import sae
from qwen_eqx import sharding
from qwen_lab import allocation, cli, corpora, files, joining, locks, places, prompts, runs, sources, sweeps, wording
from qwen_lab.hosts import Hosts
from qwen_lab.runs import Advance, Result, Run, quiet
from qwen_lab.settings import RunConfig, check, form_of
from qwen_lab.sweeps import Member
from qwen_lab.texts import Text
from sae.training import checkpoint

ModelAndTokenizer = tuple[qwen_eqx.Qwen, qwen_eqx.Tokenizer]


@dataclasses.dataclass(frozen=True)
class Job:
    """Where a run's rows come from, what it trains on them, and what a saved dictionary says of where it was trained."""

    source: sources.Source
    members: list[Member]
    facts: dict[str, Any]
    mesh: Mesh | None  # that dictionaries are trained on, and the model runs on


def train(config: RunConfig, loaded: ModelAndTokenizer | None = None, advance: Advance = quiet) -> dict[str, Result]:
    """The dictionaries of a run by name, saved in `config.out`; a run that was cut off there goes on.

    `loaded` is the model and tokenizer that `config.model` names, where they are at hand already; its mesh is the run's.
    """
    job = open_job(config, loaded)
    with locks.claimed(config.out):
        run = Run.start(config, job.members, job.source, job.mesh)
        run.proceed(advance)
        return run.finish(job.facts)


def open_job(config: RunConfig, loaded: ModelAndTokenizer | None = None) -> Job:
    """The source that `config.source` names, and the members on its sites."""
    check(config)
    combined = sweeps.combinations(config)
    if config.source == "live":
        return _live(config, combined, loaded)
    return dataclasses.replace(_replay(config, combined), mesh=config.open_mesh())


@contextmanager
def shared_job(config: RunConfig, hosts: Hosts) -> Iterator[Job]:
    """As `open_job`, of several processes that join once all have found the same code, flags, data and checkpoints."""
    check(config)
    combined = sweeps.combinations(config)
    said = joining.flags_of(config) | {"last checkpoint": checkpoint.steps(runs.checkpoints(config))[-1:]}
    if config.source == "live":
        with joining.together(hosts, said | {"model": joining.files_of(config.model, config.revision)}, config.out):
            cli.check_platform()
            job = _live(config, combined, None)
            joining.expect_same("prompts", job.source.seen.said["digest"])
            yield job
        return
    job = _replay(config, combined)
    store = job.source.store  # pyright: ignore[reportAttributeAccessIssue]
    said |= {"store's manifest": files.digest(store.manifest.to_json()), "data": job.source.seen.said["digest"]}
    said |= {"rows in the store": len(store)}
    with joining.together(hosts, said, config.out):
        cli.check_platform()
        yield dataclasses.replace(job, mesh=config.open_mesh())


def _replay(config: RunConfig, combined: list[dict[str, Any]]) -> Job:
    """All of a job that is known before JAX looks for devices."""
    store = sae.ActivationStore.open(files.location(config.store))
    allocation.keep()
    default = places.default_held(store.sites, form_of(config))
    members = sweeps.make_members(config, combined, places.in_store(store), default)
    sites = sweeps.sites_of(members)
    source = sources.Stored(
        store, held_out=config.held_out, sites=sites, prompts=config.prompts, partial=config.partial_store
    )
    manifest = store.manifest
    said = {name: manifest.config.get(name) for name in ("tasks", "encoder", "prompt")}
    said["tasks"] = " ".join(manifest.config.get("data") or ()) or said["tasks"]
    text = Text(model=manifest.model_id, tokenizer=manifest.tokenizer_digest, **said)
    return Job(source, members, _facts(text, manifest.revision, source), None)


def _live(config: RunConfig, combined: list[dict[str, Any]], loaded: ModelAndTokenizer | None) -> Job:
    model, tokenizer = loaded or config.open_model(config.model, config.dtype, config.revision)
    mesh = sharding.mesh_of(model)
    default = places.default_sites(model.config, form_of(config))
    members = sweeps.make_members(config, combined, places.in_model(model.config), default)
    asked = corpora.resolved(wording.filled(config, tokenizer), model.config)
    longest = min(config.max_prompt or model.config.max_seq, model.config.max_seq)
    how = {"held_out": config.held_out, "sites": sweeps.sites_of(members), "prompts": config.prompts}
    if asked.mode == "forward":
        source = sources.Forward(model, corpora.corpus(asked, tokenizer, min(longest, asked.context_length)), **how)
    else:
        asking = prompts.asking(tokenizer, budget=longest, encoder=asked.encoder, format=asked.prompt)
        items = prompts.items(list(corpora.tasks_of(asked)), tokenizer, asking, too_long="skip")
        source = sources.Live(model, tokenizer, items, max_new_tokens=config.max_new_tokens, **how)
    text = Text(
        config.model, " ".join(asked.data) or asked.tasks, asked.encoder, asked.prompt, f"sha256:{tokenizer.digest}"
    )
    return Job(source, members, _facts(text, config.revision, source), mesh)


def _facts(text: Text, revision: str | None, source: sources.Source) -> dict[str, Any]:
    """What was read, counted where it was: a flag's limit may be more than there was."""
    read = {"tasks_read": source.tasks_read, "held_out_tasks": list(source.held_out_tasks)}
    return {**text.metadata, "revision": revision, **read}
