"""The activation store: write-once shards of activation rows, resumable and readable while they are written.

    writer = StoreWriter.create(directory, manifest)         # a new store, or the same one resumed
    for shard in writer.missing:                             # a function of the plan and of what is committed
        writer.write_shard(shard, rows, [{"text": ..., "outcome": ...} for item in writer.plan.items_of(shard)])
    store = ActivationStore.open(directory)                  # store[i], store.batches(4096, order=permutation)

A shard is committed when its sidecar `shards/NNNNNN.json` stands; nothing in the files depends on when or where
it was written.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Int

from sae import files, shown
from sae.data.plan import Manifest, Plan
from sae.data.rows import Rows
from sae.errors import InputError

Layout = dict[str, tuple[str, tuple[int, ...]]]
_SIDECAR_FIELDS = {"rows": int, "bytes": int, "digest": str, "item_range": list, "items": list}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A committed shard: its tensors' path and what the sidecar says of them."""

    index: int
    path: Path
    rows: int
    bytes: int
    digest: str
    items: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:
        return f"Shard({self.index}: {self.rows:,} rows of {len(self.items)} items, {self.bytes:,} bytes, {self.path})"

    def columns(self) -> Rows:
        """The shard's tensors, mapped, not read: an index touches only the pages it needs."""
        return Rows(**files.map_tensors(self.path))


@dataclasses.dataclass(frozen=True)
class StoreWriter:
    """Writes the shards of one plan; several writers may share a store as long as they write different shards."""

    directory: Path
    manifest: Manifest

    @classmethod
    def create(cls, directory: str | Path, manifest: Manifest) -> "StoreWriter":
        """Start a store in a new or empty directory, or resume the one there if its manifest is this very manifest."""
        directory = Path(directory)
        manifest.check("manifest")
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory}: found a file, expected a directory")
        path = directory / "manifest.json"
        if path.exists():
            _check_same(path, Manifest.read(path), manifest)
            ActivationStore.open(directory)  # what is committed must be whole before anything is added to it
        else:
            _check_ours(directory)
            files.make_directory(directory / "shards")
            files.fsync_directory(directory.parent)
            files.commit(path, files.dump_json(manifest.to_json()))
        files.make_directory(directory / "shards")
        return cls(directory, manifest)

    @classmethod
    def extend(cls, directory: str | Path, manifest: Manifest, *fields: str, items_digest: str = "") -> "StoreWriter":
        """Resume the store there with more items than it was planned for, and other values of these fields of its config.

        `items_digest` is of the items that it was planned for, as this run finds them: its manifest must say the same.

        Full shards stay byte for byte. A last one that was not full is taken back and is missing again: the store becomes
        the one that would stand there had it been planned for all its items from the start.
        """
        directory = Path(directory)
        manifest.check("manifest")
        path = directory / "manifest.json"
        there = Manifest.read(path)
        more = dataclasses.replace(there.plan, items=max(there.plan.items, manifest.plan.items))
        changed = {name: manifest.config[name] for name in fields}
        wider = dataclasses.replace(there, plan=more, config=there.config | changed)
        _check_same(path, wider, dataclasses.replace(manifest, items_digest=items_digest))
        wider = dataclasses.replace(wider, items_digest=manifest.items_digest)
        ActivationStore.open(directory)
        last = there.plan.shards - 1
        if last >= 0 and there.plan.items_of(last) != more.items_of(last):
            # before the manifest: whoever is killed between the two leaves a store of the old plan that lacks a shard
            (directory / "shards" / f"{last:06d}.json").unlink(missing_ok=True)
            files.fsync_directory(directory / "shards")
        files.commit(path, files.dump_json(wider.to_json()))
        return cls(directory, wider)

    @property
    def plan(self) -> Plan:
        return self.manifest.plan

    @property
    def missing(self) -> tuple[int, ...]:
        """The shards of the plan that are not committed yet."""
        shards = self.directory / "shards"
        return tuple(index for index in range(self.plan.shards) if not (shards / f"{index:06d}.json").exists())

    def write_shard(self, shard: int, rows: Rows, items: Sequence[Mapping[str, Any]]) -> None:
        """Write and commit one shard; `items` holds `text`, `outcome` and any other JSON of each item, in order."""
        planned = self.plan.items_of(shard)
        where = f"{self.directory}/shards/{shard:06d}"
        if Path(f"{where}.json").exists():
            raise InputError(f"{where}.json: found a committed shard, expected none: shards are written once")
        columns = {name: np.ascontiguousarray(column) for name, column in rows.columns.items()}  # else wrong bytes
        self._check_rows(where, columns, planned)
        if len(items) != len(planned) or not all({"text", "outcome"} <= set(item) for item in items):
            raise InputError(f"{where}: items: expected {len(planned)} of them, each with text and outcome")
        data = safetensors.numpy.save(columns)
        sidecar = {
            "rows": len(columns["item"]),
            "bytes": len(data),
            "digest": files.digest(data),
            "item_range": [planned.start, planned.stop],
            "items": [{**item, "item": index} for index, item in zip(planned, items, strict=True)],
        }
        mark = files.dump_json(sidecar)  # refuses what JSON cannot hold before anything is written
        files.commit(Path(f"{where}.safetensors"), data)
        files.commit(Path(f"{where}.json"), mark)

    def _check_rows(self, where: str, columns: dict[str, np.ndarray], planned: range) -> None:
        activations, item = columns["activations"], columns["item"]
        found = {name: (column.dtype.name, column.shape) for name, column in columns.items()}
        _check_layout(where, found, self.manifest.layout(len(item)))
        if len(item) and not (planned.start <= item.min() and item.max() < planned.stop):
            raise InputError(f"{where}: item: found {item.min()} to {item.max()}, expected within {planned}")
        if not np.isfinite(activations).all():
            raise InputError(f"{where}: activations: found NaN or infinity, expected finite numbers")


@dataclasses.dataclass(frozen=True)
class ActivationStore:
    """The committed shards of a store as one long table of rows, in plan order."""

    directory: Path
    manifest: Manifest
    shards: tuple[Shard, ...]
    sites: tuple[str, ...]  # what `activations` holds along its sites axis: the manifest's, or those selected

    def __repr__(self) -> str:
        sites = shown.listed(self.sites)
        return f"ActivationStore({self.directory}: {len(self):,} rows at {sites}, {len(self.shards)} shards)"

    @classmethod
    def open(cls, directory: str | Path) -> "ActivationStore":
        """Open what is committed now; later shards are seen by opening again."""
        directory = Path(directory)
        if not (directory / "manifest.json").is_file():
            raise InputError(f"{directory}: found no manifest.json, expected an activation store")
        manifest = Manifest.read(directory / "manifest.json")
        marks = sorted(path for path in (directory / "shards").glob("*.json") if not path.name.startswith("."))
        shards = sorted((_read_shard(path, manifest) for path in marks), key=lambda shard: shard.index)
        return cls(directory, manifest, tuple(shards), manifest.sites)

    def select(self, *sites: str) -> "ActivationStore":
        """The same rows with only these sites, in this order."""
        for site in sites:
            if site not in self.sites:
                raise InputError(f"sites: found {site!r}, expected of {', '.join(self.sites)}")
        return dataclasses.replace(self, sites=sites)

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def missing(self) -> tuple[int, ...]:
        """The shards of the plan that are not committed."""
        committed = {shard.index for shard in self.shards}
        return tuple(index for index in range(self.manifest.plan.shards) if index not in committed)

    @property
    def items(self) -> dict[int, dict[str, Any]]:
        """What the sidecars say of each committed item: text, outcome and the rest, by item index."""
        return {item["item"]: item for shard in self.shards for item in shard.items}

    def column(self, name: str) -> np.ndarray:
        """One per-row column of the whole store (token_ids, positions, item, generated, colour …), to choose rows by."""
        if name not in (layout := self.manifest.layout(0)):
            raise InputError(f"{self.directory}: column: found {name!r:.40}, expected one of {', '.join(layout)}")
        parts = [getattr(columns, name) for columns in self._columns]
        return np.concatenate(parts) if parts else np.empty(0, layout[name][0])

    def __getitem__(self, index: int | slice | Int[np.ndarray, " rows"]) -> Rows:
        """Rows by number, slice or array of numbers; only what is asked for is read."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        wanted = np.asarray(index)
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"row {wanted.min()} to {wanted.max()} of a store with {len(self)} rows")
        rows = self._take(np.atleast_1d(wanted) % max(len(self), 1))
        return rows if wanted.ndim else Rows(**{name: column[0, ...] for name, column in rows.columns.items()})

    def batches(
        self, batch_size: int, *, order: Int[np.ndarray, " rows"] | None = None, start: int = 0, drop_last: bool = False
    ) -> Iterator[Rows]:
        """Batches in stored order or in `order` (row numbers: a permutation, a split), from its place `start` on."""
        if batch_size < 1:
            raise InputError(f"batch_size: found {batch_size}, expected at least 1")
        rows = len(self) if order is None else len(order)
        for begin in range(start, rows, batch_size):
            end = min(begin + batch_size, rows)
            if drop_last and end - begin < batch_size:
                return
            yield self[begin:end] if order is None else self[order[begin:end]]

    def verify(self) -> None:
        """Compare the bytes of every committed shard with its sidecar's digest; one InputError names the damaged."""
        damaged = [shard.path for shard in self.shards if files.digest_file(shard.path) != shard.digest]
        if damaged:
            names = ", ".join(path.name for path in damaged)
            raise InputError(
                f"{damaged[0].parent}: digest of {names}: found other bytes than were committed, expected those of the "
                "sidecar; delete the shard and its sidecar to have them written again"
            )

    @functools.cached_property
    def _columns(self) -> list[Rows]:
        """Of each shard, whose rows must be of the items that its sidecar names."""
        columns = [shard.columns() for shard in self.shards]
        for shard, rows in zip(self.shards, columns, strict=True):
            planned = self.manifest.plan.items_of(shard.index)
            if len(rows.item) and not (planned.start <= rows.item.min() and rows.item.max() < planned.stop):
                span = f"{rows.item.min()} to {rows.item.max()}"
                raise InputError(f"{shard.path}: item: found {span}, expected {planned.start} to {planned.stop - 1}")
        return columns

    def _take(self, wanted: np.ndarray) -> Rows:
        """Gather rows shard by shard into arrays in the order asked."""
        layout = dataclasses.replace(self.manifest, sites=self.sites).layout(len(wanted))
        taken = {name: np.empty(shape, files.numpy_dtype(dtype)) for name, (dtype, shape) in layout.items()}
        ends = np.cumsum([shard.rows for shard in self.shards])
        shard_of = np.searchsorted(ends, wanted, side="right")
        sites = [self.manifest.sites.index(site) for site in self.sites]
        for index in np.unique(shard_of):
            here = np.flatnonzero(shard_of == index)
            local = wanted[here] - (ends[index] - self.shards[index].rows)
            for name, column in self._columns[index].columns.items():
                taken[name][here] = column[local[:, None], sites] if name == "activations" else column[local]
        return Rows(**taken)


def _check_layout(where: str, found: Layout, expected: Layout) -> None:
    """Raise InputError unless there are exactly the expected tensors."""
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise InputError(f"{where}: {name}: found {_spell(found.get(name))}, expected {_spell(expected.get(name))}")


def _spell(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _read_shard(path: Path, manifest: Manifest) -> Shard:
    """The shard a sidecar commits, checked against the plan and against the size and header of its file."""
    plan, mark = manifest.plan, files.read_json(path)
    files.check_fields(path, mark, _SIDECAR_FIELDS)
    if not path.stem.isdecimal() or not int(path.stem) < plan.shards or path.stem != f"{int(path.stem):06d}":
        raise InputError(f"{path}: found a sidecar of no planned shard, expected 000000 to {plan.shards - 1:06d}")
    items = plan.items_of(int(path.stem))
    if mark["item_range"] != [items.start, items.stop]:
        raise InputError(f"{path}: item_range: found {mark['item_range']!r:.80}, expected {[items.start, items.stop]}")
    if [item.get("item") if isinstance(item, dict) else None for item in mark["items"]] != list(items):
        raise InputError(f"{path}: items: expected one object for each item of {mark['item_range']}, in order")
    tensors = path.with_suffix(".safetensors")
    found = tensors.stat().st_size if tensors.is_file() else "no file"
    if found != mark["bytes"]:
        raise InputError(f"{tensors}: bytes: found {found}, expected {mark['bytes']!r:.80} as its sidecar says")
    _check_layout(str(tensors), files.read_header(tensors), manifest.layout(mark["rows"]))
    return Shard(int(path.stem), tensors, mark["rows"], mark["bytes"], mark["digest"], tuple(mark["items"]))


def _check_ours(directory: Path) -> None:
    """Raise InputError if a directory without a manifest holds more than a killed start of a store leaves behind."""
    entries = list(directory.iterdir()) if directory.exists() else []
    for entry in entries:
        empty_shards = entry.name == "shards" and entry.is_dir() and not any(entry.iterdir())
        if not empty_shards and not files.is_temporary(entry):
            raise InputError(
                f"{directory}: found {entry.name} and no manifest.json, expected an empty directory or a store"
            )


def _check_same(path: Path, there: Manifest, here: Manifest) -> None:
    """Raise InputError listing every field in which a store's manifest differs from the run's."""
    if differences := there.differences(here):
        raise InputError(f"{path}: found another run's store, expected the same config: {'; '.join(differences)}")
