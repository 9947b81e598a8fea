"""Writes an activation store: write-once shards of rows, resumed after any kill, on a disk or at a URL.

    writer = StoreWriter.create(directory, manifest)         # a new store, or the same one resumed
    for shard in writer.missing:                             # a function of the plan and of what is committed
        writer.write_shard(shard, rows, [{"text": ..., "outcome": ...} for item in writer.plan.items_of(shard)])

A shard is committed when its sidecar `shards/NNNNNN.json` stands; nothing in the files depends on when or where
it was written.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from sae import files, storage
from sae.data import shards
from sae.data.plan import Manifest, Plan
from sae.data.rows import Rows
from sae.data.store import ActivationStore
from sae.errors import InputError
from sae.storage import Local, Place


@dataclasses.dataclass(frozen=True)
class StoreWriter:
    """Writes the shards of one plan; several writers may share a store as long as they write different shards."""

    directory: Path | str
    manifest: Manifest

    @classmethod
    def create(cls, directory: str | Path, manifest: Manifest) -> "StoreWriter":
        """Start a store in a new or empty directory, or resume the one there if its manifest is this very manifest."""
        home = storage.place(directory)
        manifest.check("manifest")
        if home.size() is not None:
            raise InputError(f"{home}: found a file, expected a directory")
        if (there := Manifest.there(home.location)) is not None:
            _check_same(home, there, manifest)
            ActivationStore.open(home.location)  # what is committed must be whole before anything is added to it
        else:
            _check_ours(home)
        if isinstance(home, Local):
            files.make_directory(home.path / "shards")
            files.fsync_directory(home.path.parent)
        if there is None:
            (home / "manifest.json").create(files.dump_json(manifest.to_json()))
        return cls(home.location, manifest)

    @classmethod
    def extend(cls, directory: str | Path, manifest: Manifest, *fields: str, items_digest: str = "") -> "StoreWriter":
        """Resume the store there with more items than it was planned for, and other values of these fields of its config.

        `items_digest` is of the items that it was planned for, as this run finds them: its manifest must say the same.

        Full shards stay byte for byte. A last one that was not full is taken back and is missing again: the store becomes
        the one that would stand there had it been planned for all its items from the start.
        """
        home = storage.place(directory)
        manifest.check("manifest")
        there = Manifest.read((home / "manifest.json").location)
        more = dataclasses.replace(there.plan, items=max(there.plan.items, manifest.plan.items))
        changed = {name: manifest.config[name] for name in fields}
        wider = dataclasses.replace(there, plan=more, config=there.config | changed)
        _check_same(home, wider, dataclasses.replace(manifest, items_digest=items_digest))
        wider = dataclasses.replace(wider, items_digest=manifest.items_digest)
        ActivationStore.open(home.location)
        last = there.plan.shards - 1
        if last >= 0 and there.plan.items_of(last) != more.items_of(last):
            # before the manifest: whoever is killed between the two leaves a store of the old plan that lacks a shard
            (home / "shards" / f"{shards.name_of(last)}.json").remove()
        (home / "manifest.json").put(files.dump_json(wider.to_json()))
        return cls(home.location, wider)

    @staticmethod
    def take_back_damaged(directory: str | Path) -> dict[int, str]:
        """What is wrong with each damaged shard of a store, by its number; they are taken back and are missing again."""
        home = storage.place(directory)
        damaged = find_damaged(directory)
        for shard in damaged:
            for ending in (".json", ".safetensors"):  # the commit mark first
                (home / "shards" / f"{shards.name_of(shard)}{ending}").remove()
        return damaged

    @property
    def plan(self) -> Plan:
        return self.manifest.plan

    @property
    def missing(self) -> tuple[int, ...]:
        """The shards of the plan that are not committed yet."""
        there = self._home.sizes()
        return tuple(index for index in range(self.plan.shards) if f"{shards.name_of(index)}.json" not in there)

    @property
    def _home(self) -> Place:
        return storage.place(self.directory) / "shards"

    def write_shard(self, shard: int, rows: Rows, items: Sequence[Mapping[str, Any]]) -> None:
        """Write and commit one shard; `items` holds `text`, `outcome` and any other JSON of each item, in order."""
        planned, name = self.plan.items_of(shard), shards.name_of(shard)
        tensors, sidecar = self._home / f"{name}.safetensors", self._home / f"{name}.json"
        where = f"{self._home}/{name}"
        if sidecar.size() is not None:
            raise InputError(f"{sidecar}: found a committed shard, expected none: shards are written once")
        columns = {name: np.ascontiguousarray(column) for name, column in rows.columns.items()}  # else wrong bytes
        found = {name: (column.dtype.name, column.shape) for name, column in columns.items()}
        shards.check_layout(where, found, self.manifest.layout(len(columns["item"])))
        shards.check_items(where, columns["item"], planned)
        shards.check_finite(where, Rows(**columns), self.manifest.sites)
        if len(items) != len(planned) or not all({"text", "outcome"} <= set(item) for item in items):
            raise InputError(f"{where}: items: expected {len(planned)} of them, each with text and outcome")
        data = safetensors.numpy.save(columns)
        mark = files.dump_json(  # refuses what JSON cannot hold before anything is written
            {
                "rows": len(columns["item"]),
                "bytes": len(data),
                "digest": files.digest(data),
                "item_range": [planned.start, planned.stop],
                "item_rows": np.bincount(columns["item"] - planned.start, minlength=len(planned)).tolist(),
                "items": [{**item, "item": index} for index, item in zip(planned, items, strict=True)],
            }
        )
        tensors.put(data)
        sidecar.create(mark)


def find_damaged(directory: str | Path) -> dict[int, str]:
    """What is wrong with each committed shard that cannot be used, by its number: every byte is read."""
    home = storage.place(directory)
    manifest, damaged = Manifest.read((home / "manifest.json").location), {}
    sizes = (home / "shards").sizes()
    for shard in range(manifest.plan.shards):
        name = f"{shards.name_of(shard)}.json"
        if name in sizes:
            try:
                mark = (home / "shards" / name).json()
                problem = shards.read_shard(home / "shards", name, mark, sizes, manifest).damage(manifest)
            except InputError as error:
                problem = str(error)
            if problem:
                damaged[shard] = problem
    return damaged


def _check_ours(home: Place) -> None:
    """Raise InputError if a directory without a manifest holds more than a killed start of a store leaves behind."""
    for name, size in home.sizes().items():
        empty_shards = name == "shards" and size is None and not (home / name).sizes()
        if not empty_shards and not files.is_temporary(name):
            raise InputError(f"{home}: found {name} and no manifest.json, expected an empty directory or a store")


def _check_same(home: Place, there: Manifest, here: Manifest) -> None:
    """Raise InputError listing every field in which a store's manifest differs from the run's."""
    if differences := there.differences(here):
        said = "; ".join(differences)
        raise InputError(f"{home}/manifest.json: found another run's store, expected the same config: {said}")
