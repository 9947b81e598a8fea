"""How much disk a store will take, said and compared with what is free before anything is computed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from qwen_lab import choosing
from qwen_lab.choosing import Choice
from qwen_lab.errors import RunError
from qwen_lab.passages import Index
from sae import Manifest


def check(out: Path | str, manifest: Manifest, index: Index, shards: Sequence[int], choice: Choice, new: int) -> str:
    """One line on the bytes that these shards will take; raises where they are known not to fit.

    `new` is the tokens that each item may have beside its own.
    """
    size = choosing.bytes_per_row(manifest)
    tokens = sum(index.tokens[shard] for shard in shards)
    items = sum(len(index.plan.items_of(shard)) for shard in shards)
    rounding = items if choice.sample_rows < 1 else 0  # each item's sample is rounded up
    most = choice.rows_at_most(tokens, items * new) + rounding
    line = f"{items:,} items of {tokens:,} tokens, {most:,} rows of {size:,} bytes at most: "
    line += f"{most * size / 1e6:,.1f} MB in {len(shards)} shards"
    if isinstance(out, str):
        return line  # a store at a URL does not say
    there = next(each for each in (out, *out.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    least = choice.rows_at_most(tokens) if choice.keeps_all_kinds else 0
    if least * size > free:
        raise RunError(
            f"{out}: found {free:,} bytes free, expected room for {least * size:,}: {least:,} rows of {size:,} bytes; lower "
            "--sample-rows, or name fewer --layers or --limit"
        )
    return f"{line}, {free / 1e6:,.0f} MB are free{'' if most * size <= free else ', which may not be enough'}"
