"""Captured activations on their way into a store: what the store says of itself, and whole shards."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qwen_eqx
import sae
from qwen_lab import extending, files, provenance


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a store says of the run that filled it; `config` is the resolved one."""

    model_id: str
    revision: str | None
    dtype: str
    seed: int
    config: dict[str, Any]


def manifest(
    model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, capture: qwen_eqx.Capture, plan: sae.Plan, origin: Origin
) -> sae.Manifest:
    """What a store says of itself before its first shard."""
    return sae.Manifest(
        model_id=origin.model_id,
        revision=origin.revision,
        config_digest=files.digest(dataclasses.asdict(model.config)),
        tokenizer_digest=f"sha256:{tokenizer.digest}",
        sites=tuple(str(site) for site in capture.resolve(model.config)),
        dtype=origin.dtype,
        d_model=model.config.d_model,
        seed=origin.seed,
        plan=plan,
        config=origin.config,
        versions=provenance.versions(),
    )


def writer(directory: Path | str, manifest: sae.Manifest) -> sae.StoreWriter:
    """Of a new store, of the same one resumed, or of one that was begun with a lower --limit."""
    there, limit = sae.Manifest.there(directory), manifest.config["limit"]
    if there is not None and extending.raised(directory, "limit", there.config.get("limit"), limit):
        return sae.StoreWriter.extend(directory, manifest, "limit")
    return sae.StoreWriter.create(directory, manifest)


class Shards:
    """Items come one after another; a shard is written as soon as it has all of its own."""

    def __init__(self, writer: sae.StoreWriter):
        self.writer = writer
        self.missing = set(writer.missing)
        self.rows: list[sae.Rows] = []
        self.items: list[Mapping[str, Any]] = []

    @property
    def committed_items(self) -> int:
        """Items before the first shard that is missing."""
        plan = self.writer.plan
        return plan.items_of(min(self.missing)).start if self.missing else plan.items

    def add(self, number: int, rows: sae.Rows, item: Mapping[str, Any]) -> None:
        """Item `number`, which follows the one added before; those of a shard that stands are passed over."""
        plan = self.writer.plan
        shard = number // plan.items_per_shard
        if shard not in self.missing:
            return
        planned = plan.items_of(shard)
        if number != planned.start + len(self.items):
            return  # a run resumed inside this shard comes back to its first item: see `committed_items`
        self.rows.append(rows)
        self.items.append(item)
        if number == planned.stop - 1:
            self.writer.write_shard(shard, sae.Rows.concatenate(self.rows), self.items)
            self.missing.discard(shard)
            self.rows, self.items = [], []
