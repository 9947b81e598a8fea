"""What is in an activation store, read back, as a table."""

import collections
from pathlib import Path

from rich.table import Table

import sae


def table(home: Path | str, speed: str = "", *, verify: bool = False) -> Table:
    """Items, tokens, rows, bytes and outcomes of what is committed; `verify` reads every byte against its digest first."""
    store = sae.ActivationStore.open(home)
    if verify:
        store.verify()
    items = [item for shard in store.shards for item in shard.items]
    said = collections.Counter(item["outcome"] for item in items)
    shown = Table(title="activation store", show_header=False)
    if any("task" in item for item in items):
        shown.add_row("tasks, test inputs", f"{len({item['task'] for item in items})}, {len(items)}")
        tokens = [sum(item.get(key, 0) for item in items) for key in ("prompt_tokens", "tokens")]
        shown.add_row("prompt tokens, answer tokens", f"{tokens[0]:,}, {tokens[1]:,}")
    else:
        shown.add_row("documents, items", f"{len({item['record'] for item in items})}, {len(items)}")
    rows = f"{len(store):,} × {len(store.sites)} × {store.manifest.d_model} {store.manifest.dtype}"
    shown.add_row("rows × sites × d_model", rows)
    size = sum(shard.bytes for shard in store.shards)
    shards = f"{len(store.shards)} of {store.manifest.plan.shards} shards"
    shown.add_row("bytes", f"{size / 1e6:,.1f} MB in {shards}{', digests verified' if verify else ''}")
    if speed:
        shown.add_row("speed", f"{speed}(compilation included)")
    shown.add_row("items", ", ".join(f"{count} {name}" for name, count in said.most_common()))
    shown.add_row("where", str(home))
    return shown
