"""Checkpoints of any tree of arrays (a TrainState, a buffer, a pair of both) and of where the data stood, at a path or URL.

DIRECTORY/00000100/state.safetensors and, written last, state.json: the digest, every leaf's shape and type, the cursor.
A checkpoint exists when its state.json does; a flipped bit, a missing leaf or another form is refused. No pickle.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sae import files, storage
from sae.errors import InputError

Tree = TypeVar("Tree")
_FORMAT = 1
_FIELDS = {"format": int, "step": int, "digest": str, "leaves": dict, "cursor": dict}


def save(
    directory: str | Path, step: int, state: Any, cursor: dict[str, Any] | None = None, keep: int = 3
) -> Path | str:
    """Write the arrays of `state` and the JSON `cursor` as checkpoint `step`; the last `keep` stay."""
    if keep < 1:
        raise InputError(f"keep: found {keep}, expected at least 1")
    arrays = _named_arrays(state)
    data = safetensors.numpy.save(arrays)
    note = {
        "format": _FORMAT,
        "step": step,
        "digest": files.digest(data),
        "leaves": {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()},
        "cursor": cursor or {},
    }
    home = storage.place(directory)
    place = home / f"{step:08d}"
    for each in (home, place):
        if each.size() is not None:
            raise InputError(f"{each}: found a file, expected a directory of checkpoints")
    spelled = files.dump_json(note)
    made = [each for each in (place, home) if isinstance(each, storage.Local) and not each.path.exists()]
    try:
        (place / "state.json").remove()  # a step saved again is not whole until its new note stands
        (place / "state.safetensors").put(data)
        (place / "state.json").put(spelled)
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
            return jax.random.wrap_key_data(jnp.array(array), impl=jax.random.key_impl(old))
        return jnp.array(array)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _name(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys).lstrip(".") or "value"


def _plain(leaf: Any) -> Any:
    """Keys as their words; everything else as it is."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _named_arrays(state: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(keys): np.asarray(_plain(leaf), order="C") for keys, leaf in leaves if eqx.is_array(leaf)}


def _named_shapes(state: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    leaves = [(keys, _plain(leaf)) for keys, leaf in jax.tree_util.tree_leaves_with_path(state) if eqx.is_array(leaf)]
    return {_name(keys): (str(leaf.dtype), leaf.shape) for keys, leaf in leaves}
