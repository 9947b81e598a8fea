"""From a config to trained dictionaries: the source opened, the members made, the run taken to its end."""

import dataclasses
from typing import Any

import jax.numpy as jnp

import qwen_eqx
import sae
from qwen_lab import corpora, files, locks, places, prompts, sources, sweeps, wording
from qwen_lab.runs import Advance, Result, Run, quiet
from qwen_lab.settings import RunConfig, check, form_of
from qwen_lab.sweeps import Member
from qwen_lab.texts import Text

ModelAndTokenizer = tuple[qwen_eqx.Qwen, qwen_eqx.Tokenizer]


@dataclasses.dataclass(frozen=True)
class Job:
    """Where a run's rows come from, what it trains on them, and what a saved dictionary says of where it was trained."""

    source: sources.Source
    members: list[Member]
    facts: dict[str, Any]


def train(config: RunConfig, loaded: ModelAndTokenizer | None = None, advance: Advance = quiet) -> dict[str, Result]:
    """The dictionaries of a run by name, saved in `config.out`; a run that was cut off there goes on.

    `loaded` is the model and tokenizer that `config.model` names, where they are at hand already.
    """
    job = open_job(config, loaded)
    with locks.claimed(config.out):
        run = Run.start(config, job.members, job.source)
        run.proceed(advance)
        return run.finish(job.facts)


def open_job(config: RunConfig, loaded: ModelAndTokenizer | None = None) -> Job:
    """The source that `config.source` names, and the members on its sites."""
    check(config)
    combined = sweeps.combinations(config)
    return _replay(config, combined) if config.source == "store" else _live(config, combined, loaded)


def _replay(config: RunConfig, combined: list[dict[str, Any]]) -> Job:
    store = sae.ActivationStore.open(files.location(config.store))
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
    return Job(source, members, _facts(text, manifest.revision, source))


def _live(config: RunConfig, combined: list[dict[str, Any]], loaded: ModelAndTokenizer | None) -> Job:
    model, tokenizer = loaded or qwen_eqx.from_pretrained(
        config.model, revision=config.revision, dtype=jnp.dtype(config.dtype)
    )
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
    return Job(source, members, _facts(text, config.revision, source))


def _facts(text: Text, revision: str | None, source: sources.Source) -> dict[str, Any]:
    """What was read, counted where it was: a flag's limit may be more than there was."""
    read = {"tasks_read": source.tasks_read, "held_out_tasks": list(source.held_out_tasks)}
    return {**text.metadata, "revision": revision, **read}
