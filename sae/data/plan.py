"""What an activation store is planned to hold, known before the first row: its manifest and the items of each shard."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae import files, shown, storage
from sae.errors import InputError

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype and shape of a tensor
FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")
PLACES = ("pair", "part", "row", "col", "colour")  # int8 columns that say where in a puzzle a row stands
DIGESTS = ("weights_digest", "items_digest")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which items each shard holds: shard s has items [s * items_per_shard, (s + 1) * items_per_shard)."""

    items: int
    items_per_shard: int

    @property
    def shards(self) -> int:
        return -(-self.items // self.items_per_shard)

    def share(self, missing: Sequence[int], worker: int, workers: int) -> tuple[int, ...]:
        """Which of the missing shards are worker `worker`'s of 0 … workers − 1: those with shard ≡ worker (mod workers).

        A shard's worker depends on its number alone, so workers that start at different times, and find other shards
        missing, still write each of them once; another number of workers deals anew what is missing then.
        """
        if not 0 <= worker < workers:
            raise InputError(f"worker: found {worker} of {workers}, expected 0 to {workers - 1}")
        return tuple(shard for shard in missing if shard % workers == worker)

    def items_of(self, shard: int) -> range:
        if not 0 <= shard < self.shards:
            raise InputError(f"shard: found {shard}, expected 0 to {self.shards - 1}, the plan's shards")
        return range(shard * self.items_per_shard, min((shard + 1) * self.items_per_shard, self.items))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the whole store has in common; a run resumes a store only if every field agrees."""

    model_id: str  # what the caller asked for: an embedded name, directory or hub id
    revision: str | None  # of the hub snapshot
    config_digest: str  # of the model's config
    tokenizer_digest: str
    sites: tuple[str, ...]  # names along the second axis of `activations`
    dtype: str  # of the activations: a key of DTYPES
    d_model: int
    seed: int
    plan: Plan
    config: dict[str, Any]  # the resolved run config
    versions: dict[str, str]  # package -> version
    columns: tuple[str, ...] = ()  # those of PLACES that every row has
    weights_digest: str = ""  # of the model's weights; empty where the writer does not know
    items_digest: str = ""  # of all that the items are; empty where the writer does not know

    def __repr__(self) -> str:
        sites = shown.listed(self.sites)
        return f"Manifest({self.model_id!r:.80} at {sites}; {self.dtype}, d_model={self.d_model}, {self.plan})"

    def to_json(self) -> dict[str, Any]:
        fields = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.loads(files.dump_json(fields))  # as it will be read back: tuples become lists

    @classmethod
    def there(cls, directory: Path | str) -> "Manifest | None":
        """Of the store in a directory or at a URL, if there is one."""
        path = storage.place(directory) / "manifest.json"
        return None if path.size() is None else cls.read(path.location)

    @classmethod
    def read(cls, path: Path | str) -> "Manifest":
        found = storage.place(path).json()
        found = {"columns": [], **dict.fromkeys(DIGESTS, ""), **found}  # earlier versions wrote none of these
        if (version := found.get("format_version")) != FORMAT_VERSION:
            said = repr(version) if "format_version" in found else "nothing"
            raise InputError(f"{path}: format_version: found {said:.80}, expected {FORMAT_VERSION}")
        files.check_fields(path, found, {"format_version": int, **_MANIFEST_FIELDS})
        files.check_fields(path, found["plan"], {"items": int, "items_per_shard": int}, prefix="plan.")
        named = {"sites": found["sites"], "columns": found["columns"], "versions": found["versions"].values()}
        for field, values in named.items():
            if not all(isinstance(value, str) for value in values):
                raise InputError(f"{path}: {field}: found {found[field]!r:.80}, expected strings")
        try:
            files.dump_json(found)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        fields: dict[str, Any] = {name: found[name] for name in _MANIFEST_FIELDS}
        fields |= {"sites": tuple(found["sites"]), "columns": tuple(found["columns"]), "plan": Plan(**found["plan"])}
        manifest = cls(**fields)
        manifest.check(str(path))
        return manifest

    def check(self, where: str) -> None:
        """Raise InputError unless the values make sense; `where` names the file or argument."""
        rules = {
            "sites": (self.sites, "distinct names, at least one", 0 < len(self.sites) == len(set(self.sites))),
            "dtype": (self.dtype, f"one of {', '.join(DTYPES)}", self.dtype in DTYPES),
            "d_model": (self.d_model, "at least 1", self.d_model > 0),
            "columns": (self.columns, f"some of {', '.join(PLACES)}, in this order", self.columns == self._places()),
            "plan.items": (self.plan.items, "0 to 2147483647", 0 <= self.plan.items < 2**31),
            "plan.items_per_shard": (self.plan.items_per_shard, "at least 1", self.plan.items_per_shard > 0),
        }
        for field, (found, expected, holds) in rules.items():
            if not holds:
                raise InputError(f"{where}: {field}: found {found!r:.80}, expected {expected}")

    def _places(self) -> tuple[str, ...]:
        return tuple(name for name in PLACES if name in self.columns)

    def layout(self, rows: int) -> Layout:
        """Dtype and shape of each tensor of a shard of so many rows."""
        each = (rows,)
        return {
            "activations": (self.dtype, (rows, len(self.sites), self.d_model)),
            "token_ids": ("int32", each),
            "positions": ("int32", each),
            "item": ("int32", each),
            "generated": ("bool", each),
            **dict.fromkeys(self.columns, ("int8", each)),
        }

    def differences(self, other: "Manifest") -> list[str]:
        """Every field in which a store's manifest differs from the `other` of a run, spelled.

        Versions are recorded, not compared: a patch release of a library must not end a store. A digest that one of the
        two does not know is not compared.
        """
        old, new = (files.flatten({**manifest.to_json(), "versions": {}}) for manifest in (self, other))
        unknown = {name for name in DIGESTS if not (old[name] and new[name])}
        return [
            f"{field} is {old.get(field, 'absent')!r} there and {new.get(field, 'absent')!r} in this run"
            for field in sorted((old.keys() | new.keys()) - unknown)
            if old.get(field, "absent") != new.get(field, "absent")
        ]


_MANIFEST_FIELDS = {
    "model_id": str, "revision": (str, type(None)), "config_digest": str, "tokenizer_digest": str, "sites": list,
    "dtype": str, "d_model": int, "seed": int, "plan": dict, "config": dict, "versions": dict, "columns": list,
    "weights_digest": str, "items_digest": str,
}  # fmt: skip
