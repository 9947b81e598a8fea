"""Let a model answer ARC tasks and keep its activations: safetensors shards with a manifest, ready for SAE training.

Without flags: the embedded demo model on six tasks of ARC-AGI-1. `--model Qwen/Qwen2.5-0.5B-Instruct` loads a real one.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import collections
import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from rich.table import Table

import arc
import qwen_eqx
import sae
from qwen_lab import bounds, cli, completions, files, flags, locks, places, prompts, provenance, rows, stopping, wording
from qwen_lab.bounds import Count, CountOrNone, Seed
from qwen_lab.errors import InputError
from qwen_lab.prompts import Item


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = wording.MODEL
    """Embedded name, directory in Hugging Face's layout, or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tasks: str = wording.AUTO
    """Data set (arc-agi-1|2/training|evaluation, procedural), directory of {id}.json, Kaggle challenges file, or JSONL.
    auto: the procedural tasks that the model was trained for, or arc-agi-1/training."""
    limit: CountOrNone = 6
    """Tasks to take, from the first; None takes all."""
    layers: flags.Blocks = "late"
    """Residual stream after these blocks: `10:24`, `3,5,7`, `all`, or `late` for the last three fifths. Or `none`."""
    sites: flags.Sites = ()
    """Further places, as TransformerLens or Hugging Face spell them: blocks.1.hook_resid_mid,blocks.1.hook_mlp_out."""
    positions: Literal["all", "generated"] = "all"
    """Every position, or only those whose logits chose a generated token."""
    max_new_tokens: Count = 64
    """Tokens to generate at most. ARC answers in Qwen tokens have 179 on average and 1,022 at most."""
    batch_size: Count = 4
    """Prompts generated together."""
    items_per_shard: Count = 8
    """Items in one shard file. An item is a test input."""
    encoder: str = wording.AUTO
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal)). auto: as trained."""
    prompt: str = wording.AUTO
    """Prompt format: a name of arc.PROMPTS. auto: as trained."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, cache and activations."""
    seed: Seed = 0
    """Of the run. Greedy decoding draws nothing."""
    out: Path = Path("runs/extract")
    """Directory of what is written. A store that was cut off, or is given a higher --limit, goes on where it stopped."""


def main(config: Config) -> None:
    bounds.check(config)
    model, tokenizer = qwen_eqx.from_pretrained(config.model, revision=config.revision, dtype=jnp.dtype(config.dtype))
    config = wording.filled(config, tokenizer)
    cli.say_what_a_demo_is(config.model)
    layers = [] if config.layers == "none" else places.parse_layers(config.layers, model.config.layers)
    capture = qwen_eqx.Capture(layers=layers, sites=config.sites, positions=config.positions)
    items = make_items(config, model.config, tokenizer)
    with locks.claimed(config.out):
        fill(config, model, tokenizer, capture, items)


def fill(
    config: Config,
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    capture: qwen_eqx.Capture,
    items: list[Item],
) -> None:
    """Every shard that is missing, and what the store holds then."""
    check_same_items(config.out, items)
    writer = rows.writer(config.out, manifest(config, model, tokenizer, capture, len(items)))
    provenance.record_run(config.out, config)
    if len(writer.missing) < writer.plan.shards:
        cli.console.print(f"going on: {len(writer.missing)} of {writer.plan.shards} shards are missing")
    cli.console.print(f"memory beside the weights, at most: {memory(config, model, capture, items)}")
    read, generated, seconds, speed = 0, 0, 0.0, ""
    todo = [index for shard in writer.missing for index in writer.plan.items_of(shard)]
    with cli.bar(len(todo), "generating", "prompts") as advance:
        for shard in writer.missing:
            numbers = writer.plan.items_of(shard)
            parts, said = [], []
            for batch in [numbers[at : at + config.batch_size] for at in range(0, len(numbers), config.batch_size)]:
                stopping.check()
                begin = time.perf_counter()
                out = answer(model, tokenizer, [items[number] for number in batch], capture, config)
                seconds += time.perf_counter() - begin
                read += sum(len(items[number].tokens) for number in batch)
                generated += int(out.lengths.sum())
                for row, number in enumerate(batch):
                    parts.append(to_rows(out, row, number, items[number]))
                    said.append(entry(out, row, items[number], tokenizer))
                speed = f"{read / seconds:,.0f} prompt, {generated / seconds:,.0f} generated tok/s"
                advance(len(batch), f"{speed} ")
            writer.write_shard(shard, sae.Rows.concatenate(parts), said)
    report(config, speed)


def check_same_items(out: Path, items: list[Item]) -> None:
    """Raises if the store there holds other items than the first of these: the tasks were changed meanwhile."""
    if not (out / "manifest.json").exists():
        return
    for number, said in sae.ActivationStore.open(out).items.items():
        if number < len(items) and (said.get("task"), said.get("test")) != (items[number].task.id, items[number].test):
            found = f"task {items[number].task.id}, test {items[number].test} as item {number}"
            expected = f"task {said.get('task')}, test {said.get('test')} as in the store {out}"
            raise InputError(f"--tasks: found {found}, expected {expected}")


def make_items(config: Config, model: qwen_eqx.QwenConfig, tokenizer: qwen_eqx.Tokenizer) -> list[Item]:
    """Every test input of the first `limit` tasks; a prompt that exceeds the model loses whole training pairs."""
    budget = model.max_seq - config.max_new_tokens
    asking = prompts.asking(tokenizer, budget=budget, encoder=config.encoder, format=config.prompt)
    return prompts.items(list(arc.load_tasks(config.tasks))[: config.limit], tokenizer, asking)


def memory(config: Config, model: qwen_eqx.Qwen, capture: qwen_eqx.Capture, items: list[Item]) -> qwen_eqx.MemoryPlan:
    """What the longest batch allocates, known before it does."""
    width = qwen_eqx.prompt_width(max(len(item.tokens) for item in items))
    kept = config.max_new_tokens + (width if config.positions == "all" else 0)
    return qwen_eqx.MemoryPlan.of(
        model.config,
        batch=config.batch_size,
        kv_seq=width + config.max_new_tokens,
        cache_dtype=config.dtype,
        sites=len(capture.resolve(model.config)),
        captured_positions=config.batch_size * kept,
        capture_dtype=config.dtype,
    )


def answer(
    model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, items: list[Item], capture: qwen_eqx.Capture, config: Config
) -> qwen_eqx.Generation:
    """What the model writes after a few prompts at once."""
    tokens = [item.tokens for item in items]
    return completions.generate(model, tokenizer, tokens, config.max_new_tokens, capture=capture)


def to_rows(out: qwen_eqx.Generation, row: int, number: int, item: Item) -> sae.Rows:
    """The stored rows of one prompt of a batch."""
    assert out.activations is not None
    prompt = None if out.prompt_activations is None else out.prompt_activations[:, row]
    return sae.Rows.of_sequence(item.tokens, completions.tokens_of(out, row), number, out.activations[:, row], prompt)


def entry(out: qwen_eqx.Generation, row: int, item: Item, tokenizer: qwen_eqx.Tokenizer) -> dict[str, Any]:
    """What an item's sidecar entry says: the task, what the model wrote, and how it reads."""
    sample = completions.read(out, row, item.request, tokenizer)
    return {
        "task": item.task.id,
        "test": item.test,
        "prompt_tokens": len(item.tokens),
        "dropped_pairs": list(item.prompt.dropped),
        "tokens": int(out.lengths[row]),
        "log_prob": round(sample.completion.log_prob, 6),
        "text": sample.completion.text,
        "outcome": completions.outcome(sample, item.task),
    }


def manifest(
    config: Config, model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, capture: qwen_eqx.Capture, items: int
) -> sae.Manifest:
    """What the store says of itself before its first shard."""
    settings = {name: value for name, value in files.jsonable(config).items() if name != "out"}
    origin = rows.Origin(config.model, config.revision, config.dtype, config.seed, settings)
    return rows.manifest(model, tokenizer, capture, sae.Plan(items, config.items_per_shard), origin)


def report(config: Config, speed: str) -> None:
    """Reads the store back and says what is in it."""
    store = sae.ActivationStore.open(config.out)
    store.verify()
    items = [item for shard in store.shards for item in shard.items]
    said = collections.Counter(item["outcome"] for item in items)
    size = sum(shard.bytes for shard in store.shards)
    table = Table(title="activation store", show_header=False)
    table.add_row("tasks, test inputs", f"{len({item['task'] for item in items})}, {len(items)}")
    table.add_row(
        "prompt tokens, generated tokens",
        f"{sum(i['prompt_tokens'] for i in items):,}, {sum(i['tokens'] for i in items):,}",
    )
    table.add_row(
        "rows × sites × d_model",
        f"{len(store):,} × {len(store.sites)} × {store.manifest.d_model} {store.manifest.dtype}",
    )
    table.add_row("bytes", f"{size / 1e6:,.1f} MB in {len(store.shards)} shards, digests verified")
    if speed:
        table.add_row("speed", f"{speed} (compilation included)")
    table.add_row("answers", ", ".join(f"{count} {name}" for name, count in said.most_common()))
    table.add_row("where", str(config.out))
    cli.console.print(table)
    cli.console.print(f"next: python experiments/train_sae.py --source store --store {config.out}")


if __name__ == "__main__":
    cli.run(main, Config)
