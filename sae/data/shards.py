"""One shard of a store: what its sidecar says of it, and its columns, whose bytes are checked before their first use."""

import collections
import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np

from sae import files, storage
from sae.data.plan import Layout, Manifest
from sae.data.rows import Rows
from sae.errors import InputError
from sae.storage import Local, Place

COPIED_BYTES = 2**33  # of remote shards that stay on this machine's disk
MAPPED = 1024  # files that stay mapped: a process may have 65,530 maps
_CHUNK = 2**22  # numbers looked at together
_EXPONENTS = {"bfloat16": ("uint16", 0x7F80), "float16": ("uint16", 0x7C00), "float32": ("uint32", 0x7F800000)}
_SIDECAR_FIELDS = {"rows": int, "bytes": int, "digest": str, "item_range": list, "items": list, "item_rows": list}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A committed shard: where its tensors are, and what the sidecar says of them."""

    index: int
    path: Path | str
    rows: int
    bytes: int
    digest: str
    items: tuple[dict[str, Any], ...]
    item_rows: tuple[int, ...] | None = None  # rows of each item; earlier versions did not say

    def __repr__(self) -> str:
        return f"Shard({self.index}: {self.rows:,} rows of {len(self.items)} items, {self.bytes:,} bytes, {self.path})"

    def columns(self) -> Rows:
        """The shard's tensors, mapped, not read: an index touches only the pages it needs. Nothing is checked."""
        with storage.place(self.path).on_disk() as path:
            return Rows(**files.map_tensors(path))

    def checked(self, manifest: Manifest) -> Rows:
        """As `columns`; before their first use in a process the bytes are checked, and again if the file changed."""
        return _opened.open(self, manifest)

    def damage(self, manifest: Manifest) -> str:
        """What is wrong with its bytes, all of them read; empty where nothing is."""
        try:
            with storage.place(self.path).on_disk() as path:
                _check(path, files.map_tensors(path), self, manifest)
        except (InputError, FileNotFoundError) as error:
            return str(error)
        return ""

    @property
    def name(self) -> str:
        return f"{name_of(self.index)}.safetensors"

    def rows_of_items(self, manifest: Manifest) -> tuple[int, ...]:
        """How many rows each of its items has."""
        if self.item_rows is not None:
            return self.item_rows
        counts = collections.Counter(np.asarray(self.checked(manifest).item).tolist())
        return tuple(counts[number] for number in manifest.plan.items_of(self.index))


def name_of(shard: int) -> str:
    """Of a shard's files, without their endings."""
    return f"{shard:06d}"


def read_shard(
    shards: Place, name: str, mark: dict[str, Any], sizes: dict[str, int | None], manifest: Manifest
) -> Shard:
    """The shard that sidecar `name` commits, checked against the plan and against the size and header of its file."""
    plan, where, stem = manifest.plan, f"{shards}/{name}", name.removesuffix(".json")
    files.check_fields(where, {"item_rows": [], **mark}, _SIDECAR_FIELDS)
    if not stem.isdecimal() or not int(stem) < plan.shards or stem != name_of(int(stem)):
        raise InputError(f"{where}: found a sidecar of no planned shard, expected 000000 to {plan.shards - 1:06d}")
    items = plan.items_of(int(stem))
    if mark["item_range"] != [items.start, items.stop]:
        raise InputError(f"{where}: item_range: found {mark['item_range']!r:.80}, expected {[items.start, items.stop]}")
    if [item.get("item") if isinstance(item, dict) else None for item in mark["items"]] != list(items):
        raise InputError(f"{where}: items: expected one object for each item of {mark['item_range']}, in order")
    tensors = shards / f"{stem}.safetensors"
    found = sizes.get(f"{stem}.safetensors")
    if found != mark["bytes"]:
        said = "no file" if found is None else found
        raise InputError(f"{tensors}: bytes: found {said}, expected {mark['bytes']!r:.80} as its sidecar says")
    if isinstance(tensors, Local):  # of a remote one the header is read when the rest is
        check_layout(str(tensors), files.read_header(tensors.path), manifest.layout(mark["rows"]))
    counts = mark.get("item_rows")
    if counts is not None and not (
        len(counts) == len(items) and all(type(n) is int and n >= 0 for n in counts) and sum(counts) == mark["rows"]
    ):
        raise InputError(
            f"{where}: item_rows: found {counts!r:.80}, expected {len(items)} counts of {mark['rows']} rows"
        )
    counted = None if counts is None else tuple(counts)
    return Shard(
        int(stem), tensors.location, mark["rows"], mark["bytes"], mark["digest"], tuple(mark["items"]), counted
    )


def check_layout(where: str, found: Layout, expected: Layout) -> None:
    """Raise InputError unless there are exactly the expected tensors."""
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise InputError(f"{where}: {name}: found {_spell(found.get(name))}, expected {_spell(expected.get(name))}")


def check_items(where: str, item: np.ndarray, planned: range) -> None:
    """Raise InputError unless every row is of a planned item."""
    if len(item) and not (planned.start <= item.min() and item.max() < planned.stop):
        span = f"{item.min()} to {item.max()}"
        raise InputError(f"{where}: item: found {span}, expected {planned.start} to {planned.stop - 1}")
    if (item[1:] < item[:-1]).any():
        raise InputError(
            f"{where}: item: found items out of order, expected the rows of one item after those of another"
        )


def check_finite(where: str, rows: Rows, sites: tuple[str, ...]) -> None:
    """Raise InputError unless every activation is a finite number."""
    wrong = np.argwhere(~_finite(np.asarray(rows.activations)))
    if len(wrong):
        row, site = wrong[0]
        raise InputError(
            f"{where}: activations: found NaN or infinity in {len(np.unique(wrong[:, 0]))} rows, the first of them item "
            f"{rows.item[row]}, position {rows.positions[row]} at {sites[site]}, expected finite numbers"
        )


def _finite(activations: np.ndarray) -> np.ndarray:
    """Whether all numbers of each row and site are, from their exponents: bfloat16 has no fast isfinite."""
    kind, mask = _EXPONENTS[activations.dtype.name]
    result = np.ones(activations.shape[:2], bool)
    step = max(1, _CHUNK // max(1, activations[:1].size))
    for start in range(0, len(activations), step):
        bits = activations[start : start + step].view(kind) & np.asarray(mask, kind)
        result[start : start + step] = (bits != mask).all(axis=-1)
    return result


def _spell(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


class _Opened:
    """The columns of the shards used last, by what their files were when they were checked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.checked: set[tuple[Any, ...]] = set()
        self.columns: collections.OrderedDict[tuple[Any, ...], Rows] = collections.OrderedDict()
        self.copied: dict[tuple[Any, ...], int] = {}  # bytes of the copies of remote files

    def open(self, shard: Shard, manifest: Manifest) -> Rows:
        place, layout = storage.place(shard.path), manifest.layout(shard.rows)
        key = (str(place), shard.digest, _state(place), manifest.plan, manifest.sites, *layout.items())
        with self.lock:
            if key in self.columns:
                self.columns.move_to_end(key)
                return self.columns[key]
        with place.on_disk() as path:
            tensors = files.map_tensors(path)
            if key not in self.checked or not isinstance(place, Local):
                _check(path, tensors, shard, manifest)
        rows = Rows(**tensors)
        with self.lock:
            self.checked.add(key)
            self.columns[key] = rows
            self.copied[key] = 0 if isinstance(place, Local) else shard.bytes
            while len(self.columns) > 1 and (len(self.columns) > MAPPED or sum(self.copied.values()) > COPIED_BYTES):
                oldest, _ = self.columns.popitem(last=False)  # its file goes with the last array that is mapped from it
                del self.copied[oldest]
        return rows


_opened = _Opened()


def _state(place: Place) -> tuple[int, int] | None:
    """What changes when a local file does; a remote one is never written twice."""
    if not isinstance(place, Local):
        return None
    try:
        status = place.path.stat()
    except OSError as error:
        raise InputError(f"{place}: found no readable file ({error.strerror}), expected a shard") from error
    return status.st_size, status.st_mtime_ns


def _check(path: Path, tensors: dict[str, np.ndarray], shard: Shard, manifest: Manifest) -> None:
    found = {name: (column.dtype.name, column.shape) for name, column in tensors.items()}
    check_layout(str(path), found, manifest.layout(shard.rows))
    check_items(str(path), tensors["item"], manifest.plan.items_of(shard.index))
    if (digest := files.digest_file(path)) != shard.digest:
        raise InputError(
            f"{path}: digest: found {digest}, expected {shard.digest!r:.80} as its sidecar says: "
            "sae.StoreWriter.take_back_damaged has it written again"
        )
    check_finite(str(path), Rows(**tensors), manifest.sites)
