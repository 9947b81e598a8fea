"""Checkpoints of any tree of arrays (a TrainState, a buffer, a pair of both) and of where the data stood, at a path or URL.

DIRECTORY/00000100/state.safetensors and, written last, state.json: the digest, every leaf's shape and type, the cursor.
A checkpoint exists when its state.json does; a flipped bit, a missing leaf or another form is refused. No pickle.

A state on a mesh makes the same file, byte for byte, as on one device: it is written from front to back, and no more
than 64 MiB of it leave the devices at a time. So it is never whole on the host, and goes on on any other mesh: `load`
lays it out as `like` is, and each device gets its own slices of the mapped file. Of several processes (all call `save`)
each writes the slices that its devices hold, into a file of its own, state-00000-of-00002.safetensors, where a tensor is
called after its leaf and its place, "module.encoder[0:512,0:64]"; the first process writes state.json when all are done.
"""

import functools
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from sae import files, storage
from sae.errors import InputError

Tree = TypeVar("Tree")
Spans = tuple[tuple[int, int], ...]
"""Where a slice begins and ends in every dimension."""
_FORMAT, _SLICED = 1, 2  # a file of whole leaves; files of their slices, one of each process
AT_ONCE = 2**26  # bytes that leave the devices together
_FIELDS = {"format": int, "step": int, "digest": (str, dict), "leaves": dict, "cursor": dict}


def save(
    directory: str | Path, step: int, state: Any, cursor: dict[str, Any] | None = None, keep: int = 3
) -> Path | str:
    """Write the arrays of `state` and the JSON `cursor` as checkpoint `step`; the last `keep` stay."""
    if keep < 1:
        raise InputError(f"keep: found {keep}, expected at least 1")
    several, first = jax.process_count() > 1, jax.process_index() == 0
    leaves = _named_leaves(state)
    tensors = _own_slices(leaves) if several else leaves
    parts = {name: (str(one.dtype), one.shape, functools.partial(_parts, one)) for name, one in tensors.items()}
    data, digest = files.hashed(files.tensor_file(parts))
    note = {
        "format": _SLICED if several else _FORMAT,
        "step": step,
        "leaves": {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()},
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
        if first:
            (place / "state.json").remove()  # a step saved again is not whole until its new note stands
        (place / _file(jax.process_index())).put(data)
        said = _of_all(digest()) if several else digest()
        if first:
            (place / "state.json").put(files.dump_json(note | {"digest": said}))
    except OSError:
        for each in made:
            with suppress(OSError):
                each.remove()
        raise
    for older in steps(directory)[:-keep] if first else ():
        (home / f"{older:08d}" / "state.json").remove()  # or what a kill leaves of it would count as whole
        (home / f"{older:08d}").remove()
    if several:
        multihost_utils.sync_global_devices("saved")  # all find it
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
    sliced = isinstance(note["digest"], dict)
    if note["format"] != (_SLICED if sliced else _FORMAT) or note["step"] != step:
        found = f"format {note['format']!r:.40}, step {note['step']!r:.40}"
        raise InputError(f"{place / 'state.json'}: found {found}, expected format {_FORMAT} or {_SLICED}, step {step}")
    held: dict[str, list[tuple[Spans, np.ndarray]]] = {}
    with ExitStack() as opened:
        for file, digest in (note["digest"] if sliced else {_file(0, 1): note["digest"]}).items():
            for name, array in _tensors(opened, place, file, digest).items():
                whole = tuple((0, size) for size in array.shape)
                name, spans = _place_of(f"{place / file}", name, array.shape) if sliced else (name, whole)
                held.setdefault(name, []).append((spans, array))
        return _restore(str(place / _file(0, 1)), like, held), note["cursor"], step


def _tensors(opened: ExitStack, place: storage.Place, file: str, digest: str) -> dict[str, np.ndarray]:
    """What a file of a checkpoint holds, mapped."""
    if not re.fullmatch(r"state(-\d+-of-\d+)?\.safetensors", file):
        raise InputError(f"{place / 'state.json'}: digest: found a file {file!r:.80}, expected a checkpoint's own")
    try:
        path = opened.enter_context((place / file).on_disk())
        if (found := files.digest_file(path)) != digest:
            raise InputError(f"{path}: digest: found {found}, expected {digest!r:.80}")
        return files.map_tensors(path)  # safetensors.numpy.load knows no bf16
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        said = error.strerror
        raise InputError(f"{place / file}: found no readable file ({said}), expected a checkpoint's arrays") from error


def _restore(where: str, like: Tree, held: dict[str, list[tuple[Spans, np.ndarray]]]) -> Tree:
    expected = {name: (str(leaf.dtype), leaf.shape) for name, leaf in _named_leaves(like).items()}
    found = {name: (str(slices[0][1].dtype), _shape_of(slices)) for name, slices in held.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(f"{where}: {name}: found {found.get(name)}, expected {expected.get(name)}")
        if (there := sum(array.size for _, array in held[name])) != (size := math.prod(expected[name][1])):
            raise InputError(f"{where}: {name}: found slices of {there} values, expected {size}")

    def leaf(keys, old):
        if not eqx.is_array(old):
            return old
        slices = held[_name(keys)]
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(_laid_out(slices, _plain(old)), impl=jax.random.key_impl(old))
        return _laid_out(slices, old)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _laid_out(slices: list[tuple[Spans, np.ndarray]], like: Any) -> jax.Array:
    """On a mesh each device's slice, read for it alone; else on the default device."""

    def read(index: Any) -> np.ndarray:
        wanted = _spans(index, like.shape)
        part = np.empty([high - low for low, high in wanted], like.dtype)  # a state is donated: not what is mapped
        for spans, array in slices:
            if (both := _overlap(wanted, spans)) is not None:
                part[_within(both, wanted)] = array[_within(both, spans)]
        return part

    if isinstance(getattr(like, "sharding", None), NamedSharding):
        return jax.make_array_from_callback(like.shape, like.sharding, read)
    return jnp.array(slices[0][1] if len(slices) == 1 else read((slice(None),) * like.ndim))


def _file(process: int, processes: int | None = None) -> str:
    processes = jax.process_count() if processes is None else processes
    return "state.safetensors" if processes == 1 else f"state-{process:05d}-of-{processes:05d}.safetensors"


def _own_slices(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What this process writes: of copies the first, and what processes hold for themselves from the first process."""
    own = {}
    for name, leaf in leaves.items():
        if jax.process_index() == 0 or not leaf.is_fully_addressable:
            for shard in leaf.addressable_shards:
                if shard.replica_id == 0:
                    own[f"{name}[{_spelled(_spans(shard.index, leaf.shape))}]"] = shard.data
    return own


def _place_of(where: str, name: str, shape: tuple[int, ...]) -> tuple[str, Spans]:
    """The leaf that a slice is of, and where in it."""
    leaf, _, place = name.removesuffix("]").rpartition("[")
    ends = [int(end) for end in re.findall(r"\d+", place)]
    spans = tuple(zip(ends[::2], ends[1::2], strict=False))
    if f"{leaf}[{_spelled(spans)}]" != name or tuple(high - low for low, high in spans) != shape:
        raise InputError(f"{where}: found {name!r:.80} of shape {shape}, expected a leaf's name and place")
    return leaf, spans


def _spelled(spans: Spans) -> str:
    return ",".join(f"{low}:{high}" for low, high in spans)


def _of_all(digest: str) -> dict[str, str]:
    """The digests of all processes' files, known when the last is written."""
    kind, _, words = digest.partition(":")
    all_words = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(words), np.uint8))
    return {_file(process): f"{kind}:{bytes(each).hex()}" for process, each in enumerate(np.asarray(all_words))}


def _shape_of(slices: list[tuple[Spans, np.ndarray]]) -> tuple[int, ...]:
    return tuple(max(high for _, high in spans) for spans in zip(*(spans for spans, _ in slices), strict=True))


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> Spans:
    return tuple((low, high) for low, high, _ in (one.indices(size) for one, size in zip(index, shape, strict=True)))


def _overlap(left: Spans, right: Spans) -> Spans | None:
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(left, right, strict=True))
    return both if all(low < high for low, high in both) else None


def _within(spans: Spans, whole: Spans) -> tuple[slice, ...]:
    return tuple(slice(low - at, high - at) for (low, high), (at, _) in zip(spans, whole, strict=True))


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
            spans = _spans(shard.index, leaf.shape)
            if (both := _overlap(block, spans)) is not None:
                # not shard.data[…], which is compiled for every place, nor all of it, of which NumPy's copy would stay
                starts = [low - first for (low, _), (first, _) in zip(both, spans, strict=True)]
                taken = lax.dynamic_slice(shard.data, starts, [high - low for low, high in both])
                part[_within(both, block)] = np.asarray(taken)
        yield part


def _blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[Spans]:
    """Where each part begins and ends in every dimension, in C order."""
    row = itemsize * math.prod(shape[1:])
    if row <= AT_ONCE:
        step = AT_ONCE // row
        for at in range(0, shape[0], step):
            yield ((at, min(at + step, shape[0])), *((0, size) for size in shape[1:]))
    else:
        for at in range(shape[0]):
            for rest in _blocks(shape[1:], itemsize):
                yield ((at, at + 1), *rest)
