"""Tiny activation stores whose rows follow from the shard's number, and what lies in a directory."""

import dataclasses
import json
from pathlib import Path

import numpy as np

import sae
from sae import files

MANIFEST = sae.Manifest(
    model_id="tiny", revision=None, config_digest="sha256:0", tokenizer_digest="sha256:1", sites=("a", "b"),
    dtype="bfloat16", d_model=3, seed=0, plan=sae.Plan(items=5, items_per_shard=2),
    config={"limit": 5, "sites": ("a",)}, versions={"jax": "0"},
)  # fmt: skip
DIGESTED = dataclasses.replace(MANIFEST, weights_digest="sha256:w", items_digest="sha256:i")


def shard_rows(manifest: sae.Manifest, shard: int) -> sae.Rows:
    """Rows that depend on (shard) alone: item i has i % 3 + 1 of them."""
    rng = np.random.default_rng(shard)
    item = np.concatenate([np.full(i % 3 + 1, i, np.int32) for i in manifest.plan.items_of(shard)])
    activations = rng.normal(size=(len(item), len(manifest.sites), manifest.d_model))
    ids = rng.integers(0, 99, len(item), dtype=np.int32)
    positions = np.arange(len(item), dtype=np.int32)
    places = {name: rng.integers(-1, 9, len(item), dtype=np.int8) for name in manifest.columns}
    return sae.Rows(
        activations.astype(files.numpy_dtype(manifest.dtype)),
        ids,
        positions,
        item,
        rng.random(len(item)) < 0.5,
        **places,
    )


def write(directory: Path | str, manifest: sae.Manifest = MANIFEST, shards=None) -> None:
    writer = sae.StoreWriter.create(directory, manifest)
    for shard in writer.missing if shards is None else shards:
        outcomes = [
            {"text": f"item {i} \udc80", "outcome": {"solved": i % 2 == 0}} for i in writer.plan.items_of(shard)
        ]
        writer.write_shard(shard, shard_rows(manifest, shard), outcomes)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def same(found: sae.Rows, expected: sae.Rows) -> None:
    assert list(found.columns) == list(expected.columns)
    for name, column in expected.columns.items():
        assert found.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(found.columns[name], column)


def cut(rows: sae.Rows, index) -> sae.Rows:
    return sae.Rows(**{name: column[index] for name, column in rows.columns.items()})


def edit_json(path: Path, **fields) -> None:
    value = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: field for name, field in value.items() if field != "DROP"}))
