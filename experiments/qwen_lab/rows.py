"""What a store says of the run that fills it: its manifest, digests of what must agree, and the store resumed."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
    columns: tuple[str, ...] = ()
    items_digest: str = ""


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
        columns=origin.columns,
        weights_digest=weights_digest(model),
        items_digest=origin.items_digest,
    )


def weights_digest(model: qwen_eqx.Qwen) -> str:
    """SHA-256 of every weight by its place in the model, in the dtype that it is used in."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        values = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}\n".encode())
        total.update(np.ascontiguousarray(values).view(np.uint8).data)
    return f"sha256:{total.hexdigest()}"


def writer(directory: Path | str, manifest: sae.Manifest, items_digest: str = "") -> sae.StoreWriter:
    """Of a new store, of the same one resumed, or of one that was begun with a lower --limit.

    `items_digest` is of as many items as that one was planned for.
    """
    there, limit = sae.Manifest.there(directory), manifest.config["limit"]
    if there is not None and extending.raised(directory, "limit", there.config.get("limit"), limit):
        return sae.StoreWriter.extend(directory, manifest, "limit", items_digest=items_digest)
    return sae.StoreWriter.create(directory, manifest)
