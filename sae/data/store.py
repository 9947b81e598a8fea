"""Reads an activation store as one long table of rows, finished or still growing, on a disk or at a URL.

    store = ActivationStore.open(directory)                  # store[i], store.batches(4096, order=permutation)

Damage is found before it is used: see `sae.data.shards`.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sae import files, shown, storage
from sae.data.plan import Manifest
from sae.data.rows import Rows
from sae.data.shards import Shard, read_shard
from sae.errors import InputError


class ItemView(NamedTuple):
    """An item of a store: its rows, and what its sidecar says of it."""

    rows: Rows
    said: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ActivationStore:
    """The committed shards of a store as one long table of rows, in plan order."""

    directory: Path | str
    manifest: Manifest
    shards: tuple[Shard, ...]
    sites: tuple[str, ...]  # what `activations` holds along its sites axis: the manifest's, or those selected

    def __repr__(self) -> str:
        sites = shown.listed(self.sites)
        return f"ActivationStore({self.directory}: {len(self):,} rows at {sites}, {len(self.shards)} shards)"

    def _repr_html_(self) -> str:
        planned, items = self.manifest.plan, self.items
        outcomes = Counter(str(item.get("outcome", "not said"))[:40] for item in items.values()).most_common(6)
        return shown.as_html(
            "ActivationStore",
            {
                "where": str(self.directory),
                "rows": f"{len(self):,}",
                "shards": f"{len(self.shards):,} of {planned.shards:,}{'' if self.complete else ': incomplete'}",
                "items": f"{len(items):,} of {planned.items:,}",
                "outcomes": ", ".join(f"{number:,} {name}" for name, number in outcomes) or "none yet",
                "sites": shown.listed(self.sites, 6),
                "activations": f"{self.manifest.dtype}, d_model={self.manifest.d_model}",
                "bytes": f"{sum(shard.bytes for shard in self.shards):,}",
                "model": self.manifest.model_id,
            },
        )

    @classmethod
    def open(cls, directory: str | Path) -> "ActivationStore":
        """Open what is committed now; later shards are seen by opening again."""
        home = storage.place(directory)
        if (manifest := Manifest.there(home.location)) is None:
            raise InputError(f"{home}: found no manifest.json, expected an activation store")
        names = sorted(
            name for name in (home / "shards").sizes() if name.endswith(".json") and not name.startswith(".")
        )
        sizes = (home / "shards").sizes()  # after the marks were seen: no tensors are missing that a mark speaks of
        marks = storage.read_all([home / "shards" / name for name in names])
        shards = [read_shard(home / "shards", *each, sizes, manifest) for each in zip(names, marks, strict=True)]
        return cls(home.location, manifest, tuple(sorted(shards, key=lambda shard: shard.index)), manifest.sites)

    def expect_complete(self) -> None:
        """Raise InputError that names what is missing unless every shard of the plan is committed."""
        if missing := self.missing:
            named = shown.listed([str(index) for index in missing], 8)
            raise InputError(
                f"{self.directory}: found {len(self.shards)} of {self.manifest.plan.shards} shards, missing {named}, "
                "expected all: give the command that writes it again, and it goes on"
            )

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
        parts = [shard.checked(self.manifest).columns[name] for shard in self.shards]
        return np.concatenate(parts) if parts else np.empty(0, layout[name][0])

    @functools.cached_property
    def item_rows(self) -> dict[int, range]:
        """The rows of each committed item, by item index."""
        counts = [count for shard in self.shards for count in shard.rows_of_items(self.manifest)]
        ends = np.cumsum(counts, dtype=np.int64).tolist()
        return {item: range(end - count, end) for item, end, count in zip(self.items, ends, counts, strict=True)}

    def item(self, number: int) -> ItemView:
        """One item's rows with what its sidecar says of it."""
        if number not in self.item_rows:
            raise InputError(f"{self.directory}: item: found no committed item {number}, expected one")
        rows = self.item_rows[number]
        return ItemView(self[rows.start : rows.stop], self.items[number])

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
        """Look at every byte of every committed shard again; one InputError names the damaged."""
        problems = {shard.name: problem for shard in self.shards if (problem := shard.damage(self.manifest))}
        if problems:
            names, first = ", ".join(problems), next(iter(problems.values()))
            raise InputError(
                f"{self.directory}: digest of {names}: found other bytes than were committed, expected those of the "
                f"sidecar ({first}); sae.StoreWriter.take_back_damaged has them written again"
            )

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
            for name, column in self.shards[index].checked(self.manifest).columns.items():
                taken[name][here] = column[local[:, None], sites] if name == "activations" else column[local]
        return Rows(**taken)
