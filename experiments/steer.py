"""Turn one latent of a sparse autoencoder up or down while a model answers ARC tasks, and show before and after.

add:   x' = x + value · decoder_j at the site that the SAE writes.
clamp: latent j is held at the value, and what the SAE leaves out of x stays as it was.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from rich.table import Column, Table
from rich.text import Text

import qwen_eqx
import sae
from qwen_lab import bounds, cli, completions, files, flags, loading, locks, prompts, provenance, texts, wording
from qwen_lab.bounds import Count, CountOrNone, Strength, Whole
from qwen_lab.errors import InputError
from qwen_lab.places import Dictionary
from qwen_lab.prompts import Item


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(loading.OnModel):
    sae: str = loading.EMBEDDED
    """SAE directory, file or hub id."""
    latent: Whole | None = None
    """Number of the latent; without it the strongest of those that fire on 0.1 to 10 % of the prompts' tokens."""
    mode: Literal["add", "clamp"] = "add"
    """Add the latent's direction, or hold the latent at a value."""
    strength: Strength = 4.0
    """The value, in units of the latent's largest one on these prompts (of 1 if it never fires); may be negative or 0."""
    where: Literal["all", "prompt", "generated"] = "all"
    """Positions to change: all, the prompt's, or those that choose generated tokens."""
    limit: CountOrNone = 3
    """Tasks to take, from the first; None takes all."""
    max_prompt: flags.MaxPrompt = 1024
    """Prompt tokens at most: whole training pairs are left out to fit; None: what the model holds."""
    max_new_tokens: Count = 64
    """Tokens to generate at most."""
    out: Path = Path("runs/steer")
    """Directory of what is written. It is steer.json."""


def main(config: Config) -> None:
    bounds.check(config)
    if not math.isfinite(config.strength):
        raise InputError(f"--strength: found {config.strength}, expected a finite number")
    loaded = sae.load_with_metadata(config.sae)
    if config.latent is not None and not 0 <= config.latent < loaded.module.d_sae:
        raise InputError(f"--latent: found {config.latent}, expected 0 to {loaded.module.d_sae - 1}")
    model, tokenizer, name = config.load_model([loaded.metadata])
    dictionary = config.dictionary(config.sae, loaded, model.config)
    place = dictionary.place
    if not clampable(dictionary) and config.mode == "clamp":
        raise InputError(f"--mode: found clamp for a dictionary of {place}, expected add: it reads other sites too")
    config = wording.filled(config, tokenizer, loaded.metadata)
    items = make_items(config, loaded.metadata, model.config, tokenizer, name)
    latent, peak = pick(model, dictionary, items, config.latent)
    value = config.strength * (peak or 1.0)
    verb = f"plus {value:.3g} times" if config.mode == "add" else f"with the value held at {value:.3g} of"
    cli.console.print(
        f"latent {latent} at {place.written}: {verb} its direction; its largest value on these prompts is {peak:.3g}"
    )
    edits = make_edits(config, dictionary, latent, value)
    facts = {"latent": latent, "value": value, "site": place.written, "peak": peak}
    with locks.claimed(config.out):
        compare(config, model, tokenizer, items, edits, facts)
    other = "" if not clampable(dictionary) else " (or --mode clamp)"
    cli.console.print(f"next: python experiments/steer.py --sae {config.sae} --latent {latent} --strength -4{other}")


def compare(
    config: Config,
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    items: list[Item],
    edits: tuple[qwen_eqx.AbstractEdit, ...],
    facts: dict[str, Any],
) -> None:
    """The answers without and with the edits, shown and written beside `facts`."""
    files.expect_files(config.out, "run.json", "steer.json")
    provenance.record_run(config.out, config)
    before, after = (answer(config, model, tokenizer, items, each) for each in ((), edits))
    show(f"latent {facts['latent']}, {config.mode}, {config.where}", items, before, after)
    changed = float(np.mean([old["tokens"] != new["tokens"] for old, new in zip(before, after, strict=True)]))
    cli.console.print(f"{changed:.0%} of the answers changed")
    answers = [{"task": i.task.id, "before": a, "after": b} for i, a, b in zip(items, before, after, strict=True)]
    files.write_json(config.out / "steer.json", facts | {"changed": changed, "answers": answers})
    cli.console.print(f"wrote: {config.out / 'steer.json'}")


def make_items(
    config: Config, metadata: Mapping[str, Any], model: qwen_eqx.QwenConfig, tokenizer: qwen_eqx.Tokenizer, name: str
) -> list[Item]:
    """Those test inputs of tasks the SAE was not trained on whose prompts fit; other text than its own is said first."""
    source, tasks = loading.unseen_tasks(metadata, config.tasks)
    read = texts.Text(name, source, config.encoder, config.prompt, f"sha256:{tokenizer.digest}")
    for line in texts.warnings(read, {config.sae: texts.Text.of_metadata(metadata)}):
        cli.console.print(line, markup=False)
    budget = min(config.max_prompt or model.max_seq, model.max_seq)
    asking = prompts.asking(tokenizer, budget=budget, encoder=config.encoder, format=config.prompt)
    return prompts.items(tasks[: config.limit], tokenizer, asking, too_long="skip")


def pick(model: qwen_eqx.Qwen, dictionary: Dictionary, items: list[Item], latent: int | None) -> tuple[int, float]:
    """The latent asked for or chosen, and its largest value on the prompts."""
    acts = (qwen_eqx.captured(model, item.tokens, dictionary.place.reads) for item in items)
    codes = [sae.encoded(dictionary.module, dictionary.read(each)) for each in acts]
    peaks = np.max([z.max(axis=0) for z in codes], axis=0)
    fired = np.sum([(z > 0).sum(axis=0) for z in codes], axis=0)
    share = fired / sum(len(item.tokens) for item in items)
    if latent is None:
        selective = np.where((share >= 0.001) & (share <= 0.1), peaks, 0.0)
        latent = int(np.argmax(selective if selective.any() else peaks))
    return latent, float(peaks[latent])


def show(title: str, items: list[Item], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """The answers side by side."""
    table = Table(
        "task", Column("before", overflow="fold"), Column("after", overflow="fold"), title=title, show_lines=True
    )
    for item, old, new in zip(items, before, after, strict=True):
        table.add_row(item.task.id, printable(old["text"]), printable(new["text"]))
    cli.console.print(table, soft_wrap=False)


def printable(text: str) -> Text:
    """Text for a terminal: a control character becomes a dot."""
    return Text("".join(each if each.isprintable() or each == "\n" else "·" for each in text))


def clampable(dictionary: Dictionary) -> bool:
    """Whether what it puts at a site depends on what stands there alone."""
    return not dictionary.place.transcodes and not dictionary.module.several_sites


def make_edits(config: Config, dictionary: Dictionary, latent: int, value: float) -> tuple[qwen_eqx.AbstractEdit, ...]:
    """One edit for each site that is written."""
    rows = dictionary.by_site(dictionary.module.decoder[latent][None])
    if config.mode == "add":
        return tuple(qwen_eqx.Steer(row[0], value, site=site, where=config.where) for site, row in rows.items())
    held = sae.Clamped(dictionary.module, jnp.int32(latent), jnp.float32(value))
    (site,) = rows
    return (qwen_eqx.Replace(held, error_of=dictionary.module, site=site, where=config.where),)


def answer(
    config: Config,
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    items: list[Item],
    edits: tuple[qwen_eqx.AbstractEdit, ...],
) -> list[dict[str, Any]]:
    """What the model writes, greedily, and how it reads as a grid."""
    out = completions.generate(model, tokenizer, [item.tokens for item in items], config.max_new_tokens, edits=edits)
    answers = []
    for row, item in enumerate(items):
        sample = completions.read(out, row, item.request, tokenizer)
        grid = None if sample.grid is None else sample.grid.tolist()
        said = {"text": sample.completion.text, "tokens": completions.tokens_of(out, row).tolist()}
        answers.append(said | {"grid": grid, "reason": sample.parsed.reason})
    return answers


if __name__ == "__main__":
    cli.run(main, Config)
