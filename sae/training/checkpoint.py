"""Checkpoints of any tree of arrays (a TrainState, a buffer, a pair of both) and of where the data stood, at a path or URL.

DIRECTORY/00000100/state.safetensors and, written last, state.json: the digest, every leaf's shape and type, the cursor.
A checkpoint exists when its state.json does; a flipped bit, a missing leaf or another form is refused. No pickle.

A state on a mesh makes the same file, byte for byte, as on one device: it is written from front to back, and no more
than 64 MiB of it leave the devices at a time. So it is never whole on the host, and goes on on any other mesh: `load`
lays it out as `like` is, and each device gets its own slices of the mapped file.
"""

import functools
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from sae import files, storage
from sae.errors import InputError

Tree = TypeVar("Tree")
_FORMAT = 1
AT_ONCE = 2**26  # bytes that leave the devices together
_FIELDS = {"format": int, "step": int, "digest": str, "leaves": dict, "cursor": dict}


def save(
    directory: str | Path, step: int, state: Any, cursor: dict[str, Any] | None = None, keep: int = 3
) -> Path | str:
    """Write the arrays of `state` and the JSON `cursor` as checkpoint `step`; the last `keep` stay."""
    if keep < 1:
        raise InputError(f"keep: found {keep}, expected at least 1")
    leaves = _named_leaves(state)
    shapes = _named_shapes(state)
    parts = {name: (*shapes[name], functools.partial(_parts, leaf)) for name, leaf in leaves.items()}
    data, digest = files.hashed(files.tensor_file(parts))
    note = {
        "format": _FORMAT,
        "step": step,
        "leaves": {name: [dtype, list(shape)] for name, (dtype, shape) in shapes.items()},
        "cursor": cursor or {},
    }
    files.dump_json(note)  # raises before anything is written
    home = storage.place(directory)
    place = home / f"{step:08d}"
    for each in (home, place):
        if each.size() is not None:
            raise InputError(f"{each}: found a file, expected a directory of checkpoints")
    made = [each for each in (place, home) if isinstance(each, storage.Local) and not each.path.exists()]
    try:
        (place / "state.json").remove()  # a step saved again is not whole until its new note stands
        (place / "state.safetensors").put(data)
        (place / "state.json").put(files.dump_json(note | {"digest": digest()}))
    except OSError:
        for each in made:
            with suppress(OSError):
                each.remove()
        raise
    for older in steps(directory)[:-keep]:
        (home / f"{older:08d}" / "state.json").remove()  # or what a kill leaves of it would count as whole
        (home / f"{older:08d}").remove()
    return place.location


def steps(directory: str | Path) -> list[int]:
    """The steps of the whole checkpoints in a directory, rising."""
    home = storage.place(directory)
    names = [name for name, size in home.sizes().items() if size is None]
    named = sorted(int(name) for name in names if re.fullmatch("[0-9]{8}|[1-9][0-9]{8,18}", name))
    return [step for step in named if (home / f"{step:08d}" / "state.json").size() is not None]


def load(directory: str | Path, like: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any], int]:
    """The state (shaped as `like`, whose static parts it takes), the cursor, and the step: the last unless said."""
    known = steps(directory)
    if not known or (step is not None and step not in known):
        raise InputError(f"{directory}: found checkpoints {known}, expected {'one' if step is None else step}")
    step = known[-1] if step is None else step
    place = storage.place(directory) / f"{step:08d}"
    note = (place / "state.json").json()
    files.check_fields(str(place / "state.json"), note, _FIELDS)
    if note["format"] != _FORMAT or note["step"] != step:
        found = f"format {note['format']!r:.40}, step {note['step']!r:.40}"
        raise InputError(f"{place / 'state.json'}: found {found}, expected format {_FORMAT}, step {step}")
    try:
        with (place / "state.safetensors").on_disk() as path:
            if (found := files.digest_file(path)) != note["digest"]:
                raise InputError(f"{path}: digest: found {found}, expected {note['digest']!r:.80}")
            arrays = files.map_tensors(path)  # safetensors.numpy.load knows no bf16
            return _restore(path, like, arrays), note["cursor"], step
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        where, said = place / "state.safetensors", error.strerror
        raise InputError(f"{where}: found no readable file ({said}), expected a checkpoint's arrays") from error


def _restore(path: Path, like: Tree, arrays: dict[str, np.ndarray]) -> Tree:
    expected = _named_shapes(like)
    found = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(f"{path}: {name}: found {found.get(name)}, expected {expected.get(name)}")

    def leaf(keys, old):
        if not eqx.is_array(old):
            return old
        array = arrays[_name(keys)]
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(_laid_out(array, _plain(old)), impl=jax.random.key_impl(old))
        return _laid_out(array, old)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _laid_out(array: np.ndarray, like: Any) -> jax.Array:
    """On a mesh each device's slice, read for it alone; else on the default device."""
    sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.array(array)
    # copied: a state is donated, and what is mapped cannot be written
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))


def _name(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys).lstrip(".") or "value"


def _plain(leaf: Any) -> Any:
    """Keys as their words; everything else as it is."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _named_leaves(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(keys): _plain(leaf) for keys, leaf in leaves if eqx.is_array(leaf)}


def _parts(leaf: Any) -> Iterator[np.ndarray]:
    """The values in order, at most AT_ONCE bytes together, each from the device that holds it."""
    if not isinstance(leaf, jax.Array) or leaf.nbytes <= AT_ONCE:
        yield np.asarray(leaf)
        return
    held = {str(shard.index): shard for shard in leaf.addressable_shards}.values()  # of copies one
    for block in _blocks(leaf.shape, leaf.dtype.itemsize):
        part = np.empty([high - low for low, high in block], leaf.dtype)
        for shard in held:
            spans = [slice_.indices(size)[:2] for slice_, size in zip(shard.index, leaf.shape, strict=True)]
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, spans, strict=True)]
            if any(low >= high for low, high in both):
                continue
            # not shard.data[…], which is compiled for every place, nor all of it, of which NumPy's copy would stay
            starts = [low - first for (low, _), (first, _) in zip(both, spans, strict=True)]
            taken = lax.dynamic_slice(shard.data, starts, [high - low for low, high in both])
            where = tuple(slice(low - at, high - at) for (low, high), (at, _) in zip(both, block, strict=True))
            part[where] = np.asarray(taken)
        yield part


def _blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[list[tuple[int, int]]]:
    """Where each part begins and ends in every dimension, in C order."""
    row = itemsize * math.prod(shape[1:])
    if row <= AT_ONCE:
        step = AT_ONCE // row
        for at in range(0, shape[0], step):
            yield [(at, min(at + step, shape[0])), *((0, size) for size in shape[1:])]
    else:
        for at in range(shape[0]):
            for rest in _blocks(shape[1:], itemsize):
                yield [(at, at + 1), *rest]


def _named_shapes(state: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(leaf.dtype), leaf.shape) for name, leaf in _named_leaves(state).items()}
