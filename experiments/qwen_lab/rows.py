"""Captured activations on their way into a store: the rows of a sequence, what the store says of itself, whole shards."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import qwen_eqx
import sae
from qwen_lab import files, provenance


def of_sequence(
    prompt: Sequence[int],
    tokens: Sequence[int] | np.ndarray,
    number: int,
    activations: Float[Array, "sites new d_model"],
    prompt_activations: Float[Array, "sites prompt d_model"] | None,
) -> sae.Rows:
    """The stored rows of one prompt and what followed: the activation at a position, with the token read there.

    `generated` marks positions whose logits chose a token: the last one of the prompt and all but the last one after it.
    """
    length = len(tokens)
    read = np.asarray([*prompt, *tokens[: length - 1]], np.int32)
    kept = np.asarray(activations[:, :length])
    start = len(prompt) - 1
    if prompt_activations is not None:  # its last position is the one that produced token 0, already kept
        width = prompt_activations.shape[1]
        kept = np.concatenate([np.asarray(prompt_activations[:, width - len(prompt) : width - 1]), kept], axis=1)
        start = 0
    place = np.arange(start, len(read), dtype=np.int32)
    item = np.full(len(place), number, np.int32)
    return sae.Rows(kept.transpose(1, 0, 2), read[start:], place, item, place >= len(prompt) - 1)


def nothing(manifest: sae.Manifest) -> sae.Rows:
    """No rows: of an item that had no prompt."""
    empty = np.empty(0, np.int32)
    shape = (0, len(manifest.sites), manifest.d_model)
    return sae.Rows(np.empty(shape, jnp.dtype(manifest.dtype)), empty, empty, empty, np.empty(0, bool))


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
            self.writer.write_shard(shard, sae.Rows(*map(np.concatenate, zip(*self.rows, strict=True))), self.items)
            self.missing.discard(shard)
            self.rows, self.items = [], []
