"""Many devices: a mesh of them, rules for which of its axes each parameter is split over, and where rows of a batch go.

Axes of a mesh are ("data", "model"): rows of a batch are dealt to `data`, heads, d_ff and vocab to `model`. XLA's
partitioner does the rest (arXiv 2105.04663), so nothing here is part of a model.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_eqx.errors import InputError

AXES = ("data", "model")
# path of a parameter -> what its dimensions count; those that are not named are never split. Query heads are split as the
# key heads they read are: were they split finer, the cache would be gathered every step
RULES: dict[str, tuple[str | None, ...]] = {
    r"embed\.table|head\.weight": ("vocab", "d_model"),
    r"blocks\.\d+\.attn\.[qkv]\.(weight|bias)": ("kv_heads", "d_model"),
    r"blocks\.\d+\.attn\.o\.weight": ("d_model", "kv_heads"),
    r"blocks\.\d+\.mlp\.(gate|up)\.weight": ("d_ff", "d_model"),
    r"blocks\.\d+\.mlp\.down\.weight": ("d_model", "d_ff"),
    r"(blocks\.\d+\.(attn|mlp)_)?norm\.weight": ("d_model",),
}
# what dimensions count -> the axis that shares it; where the axis does not divide the count, every device holds all of it
TENSOR: dict[str, str] = {"kv_heads": "model", "d_ff": "model", "vocab": "model"}
FULLY_SHARDED: dict[str, str] = {**TENSOR, "d_model": "data"}  # for training: weights and optimizer over `data` too

AnyMesh = Mesh | AbstractMesh
Tree = TypeVar("Tree")
Result = TypeVar("Result")
_LOG = logging.getLogger("qwen_eqx")  # warnings reach stderr unless somebody listens


def make_mesh(asked: str | Mesh = "auto", *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data and model from `data=4,model=2`, `auto` (all devices over data), or a mesh with these axes.

    Without `data=` as many rows of devices as there are for `model=`; without `model=` one. Logs how it fills the devices.
    """
    if isinstance(asked, Mesh):
        return _of_mesh(asked)
    there = list(jax.devices() if devices is None else devices)
    data, model = sizes(asked, len(there))
    said = describe(data, model)
    if data * model < len(there):
        _LOG.warning("mesh %s: takes %d of the %d devices; the others stay idle", said, data * model, len(there))
    elif asked != "auto" and "data" not in _parsed(asked):
        _LOG.warning("mesh %s: data was filled up to the %d devices", said, len(there))
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), AXES, axis_types=auto, devices=there[: data * model])


def sizes(asked: str, devices: int) -> tuple[int, int]:
    """Of data and model, as `--mesh` asks for them of so many devices; raises if they take more."""
    said = _parsed(asked)
    model = said.get("model", 1)
    data = said.get("data", max(1, devices // model))
    if data * model > devices:
        most = max((size for size in range(1, devices + 1) if model % size == 0), default=1)
        such = describe(devices // most, most)
        takes = f"found {asked!r}, which takes {data * model} devices"
        raise InputError(f"mesh: {takes}, expected at most the {devices} there are, such as {such}")
    return data, model


def describe(data: int, model: int) -> str:
    """A shape as `--mesh` takes it."""
    return f"data={data},model={model}"


def _parsed(asked: str) -> dict[str, int]:
    if asked == "auto":
        return {}
    found = [re.fullmatch(r"\s*(data|model)\s*=\s*(\d{1,6})\s*", part) for part in asked.split(",")]
    sizes = {match[1]: int(match[2]) for match in found if match is not None}
    if len(sizes) < len(found) or not all(sizes.values()):
        raise InputError(f"mesh: found {asked!r}, expected 'auto', or sizes of at least 1 such as 'data=4,model=2'")
    return sizes


def _of_mesh(mesh: Mesh) -> Mesh:
    """The user's devices in their order, on our axes, left to the partitioner: explicit axes fail in an embedding."""
    if not mesh.axis_names or len(set(mesh.axis_names) & set(AXES)) != len(mesh.axis_names):
        raise InputError(f"mesh: found axes {mesh.axis_names}, expected 'data', 'model' or both")
    devices = mesh.devices
    if mesh.axis_names == AXES[::-1]:
        devices = devices.T
    shape = [mesh.shape.get(axis, 1) for axis in AXES]
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def shardings(
    model: Any,
    mesh: AnyMesh,
    *,
    rules: Mapping[str, tuple[str | None, ...]] = RULES,
    over: Mapping[str, str] = TENSOR,
) -> Any:
    """A `NamedSharding` for every array of a model, or of its skeleton.

    Raises `InputError` for a rule that no parameter's path matches, and for a parameter whose path two rules match.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    unused, made = set(rules), []
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        matching = [rule for rule in rules if re.fullmatch(rule, path)]
        if len(matching) > 1:
            raise InputError(f"rules: found {' and '.join(map(repr, matching))} for {path}, expected one rule")
        unused -= set(matching)
        counts = (rules[matching[0]] if matching else ())[: leaf.ndim]
        axes = [_axis(count, model.config, mesh, over) for count in counts]
        made.append(NamedSharding(mesh, PartitionSpec(*axes)))  # pyright: ignore[reportArgumentType]
    if unused:
        raise InputError(f"rules: found {', '.join(map(repr, sorted(unused)))}, which match no parameter")
    return jax.tree_util.tree_unflatten(structure, made)


def _axis(count: str | None, config: Any, mesh: AnyMesh, over: Mapping[str, str]) -> str | None:
    axis = None if count is None else over.get(count)
    return axis if axis is not None and getattr(config, str(count)) % mesh.shape[axis] == 0 else None


def not_split(config: Any, mesh: AnyMesh, over: Mapping[str, str] = TENSOR) -> list[str]:
    """What every device holds whole because its axis does not divide it, one line each."""
    return [
        f"{count}={getattr(config, count)} is no multiple of {axis}={mesh.shape[axis]}: every device holds all of them"
        for count, axis in over.items()
        if _axis(count, config, mesh, over) is None
    ]


def say_what_is_not_split(config: Any, mesh: AnyMesh, over: Mapping[str, str] = TENSOR) -> None:
    """Logs it."""
    for line in not_split(config, mesh, over):
        _LOG.warning("mesh %s: %s", describe(mesh.shape["data"], mesh.shape["model"]), line)


def shard(model: Tree, mesh: Mesh, *, over: Mapping[str, str] = TENSOR) -> Tree:
    """The model with its weights on a mesh: what is computed with it then runs there."""
    say_what_is_not_split(model.config, mesh, over)  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree.map(placed, model, shardings(model, mesh, over=over))


def placed(array: Any, where: NamedSharding) -> jax.Array:
    """It, there. What every process has whole each gives to its own devices: nothing is sent, nor compared."""
    if where.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, where)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        words = placed(jax.random.key_data(array), where)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def mesh_of(model: Any) -> Mesh | None:
    """The mesh that a model's weights, or their shapes in a skeleton, lie on; None for a single device."""
    for leaf in jax.tree.leaves(model):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None


def platform(model: Any) -> str | None:
    """What a program of a model, or of its skeleton on a mesh, is compiled for; None: whatever is the default."""
    for leaf in jax.tree.leaves(model):
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
            return next(iter(sharding.device_set)).platform
    return None


def bytes_per_device(model: Any, mesh: AnyMesh, over: Mapping[str, str] = TENSOR) -> int:
    """Bytes of weights on each device of a mesh; of a skeleton as of a model, and of devices that are not here."""
    leaves, places = jax.tree.leaves(model), jax.tree.leaves(shardings(model, mesh, over=over))
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    )


def check_fits(model: Any, mesh: Mesh, free_bytes: int | None, over: Mapping[str, str] = TENSOR) -> None:
    """Raises `InputError`, saying which mesh would do, if a device lacks room for its weights (None: not known)."""
    needed = bytes_per_device(model, mesh, over)
    if free_bytes is None or needed <= free_bytes:
        return
    here = describe(mesh.shape["data"], mesh.shape["model"])
    found = f"weights take {needed / 1e6:,.1f} MB a device on mesh {here}, and {free_bytes / 1e6:,.1f} MB are free"
    heads = model.config.heads
    for size in (size for size in range(mesh.shape["model"] + 1, heads + 1) if heads % size == 0):
        if (less := bytes_per_device(model, AbstractMesh((1, size), AXES), over)) <= free_bytes:
            raise InputError(f"mesh: {found}; expected model={size}, with {less / 1e6:,.1f} MB a device")
    raise InputError(f"mesh: {found}; expected a smaller model or larger devices: no mesh splits it so far")


def share(config: Any, mesh: AnyMesh | None) -> Any:
    """The config of what one device holds of keys and values: its heads, where the mesh divides them."""
    size = 1 if mesh is None else mesh.shape["model"]
    if config.kv_heads % size:
        return config
    return dataclasses.replace(config, heads=config.heads // size, kv_heads=config.kv_heads // size)


def rows_share(rows: int, mesh: Mesh | None) -> int:
    """The most rows of so many that one device holds."""
    return rows if mesh is None else -(-rows // mesh.shape["data"])


def rows_lacking(rows: int, mesh: Mesh | None, each: int = 1) -> int:
    """How many more rows, each made `each` times, until every device has as many."""
    if mesh is None:
        return 0
    whole = mesh.shape["data"] // math.gcd(mesh.shape["data"], each)
    return -rows % whole


def _rows_spec(rows: int, mesh: Mesh, axis: int = 0) -> PartitionSpec:
    """Rows over data; where it does not divide them every device has all."""
    return rows_at(axis) if rows % mesh.shape["data"] == 0 else PartitionSpec()


def place_rows(tree: Tree, mesh: Mesh | None) -> Tree:
    """Arrays whose first axis are rows, dealt to the devices."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: placed(leaf, NamedSharding(mesh, _rows_spec(leaf.shape[0], mesh))), tree)


def place_whole(tree: Tree, mesh: Mesh | None) -> Tree:
    """A tree whose arrays every device has whole."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: placed(leaf, whole) if isinstance(leaf, jax.Array) else leaf, tree)


def here(tree: Tree) -> Tree:
    """A tree whose arrays lie whole on a device of this process, if they lie on those of several; all of them call this."""
    mesh = mesh_of(tree)
    if mesh is None or not mesh.is_multi_process:
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), place_whole(tree, mesh))


def keep_rows(tree: Tree, mesh: Mesh | None, *, axis: int = 0, split: int | None = None) -> Tree:
    """Inside a compiled function: rows along `axis` stay dealt, and what follows rows, of `split` heads or words, split."""
    if mesh is None:
        return tree

    def kept(leaf: Any) -> Any:
        if leaf.ndim <= axis:
            return leaf
        spec = list(_rows_spec(leaf.shape[axis], mesh, axis))
        if split is not None and leaf.ndim > 1 and split % mesh.shape["model"] == 0:
            spec = [*(spec or [None]), "model"]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(kept, tree)


def rows_at(axis: int) -> PartitionSpec:
    """Of an array whose `axis` are rows, dealt to the devices."""
    return PartitionSpec(*[None] * axis, "data")


ROWS, SITES_ROWS = rows_at(0), rows_at(1)


def deals(rows: int, mesh: Mesh | None) -> bool:
    """Whether a mesh gives each of several groups of devices rows of its own."""
    return mesh is not None and mesh.shape["data"] > 1 and rows % mesh.shape["data"] == 0


def specs(tree: Any, rows: Sequence[Any] | None = None) -> Any:
    """For `by_rows`: which arrays of a tree have rows along their first axis; all that have one if none are named."""

    def spec(leaf: Any) -> PartitionSpec:
        of_rows = leaf.ndim > 0 if rows is None else any(leaf is each for each in rows)
        return PartitionSpec("data") if of_rows else PartitionSpec()

    return jax.tree.map(spec, tree)


def by_rows(call: Callable[..., Result], mesh: Mesh | None, given: Mapping[str, tuple[Any, Any]], made: Any) -> Result:
    """call(**given), every device on its own rows; what is split over model stays the partitioner's.

    Each argument comes with its specs, and `made` are those of the result. What is made of rows, a top_k too, for which the
    partitioner would gather all of them, is what one device makes of these rows alone, bit for bit.
    """
    # no check: loops mix what is the same on all devices with what is not
    how: dict[str, Any] = {"mesh": mesh, "axis_names": frozenset({"data"}), "check_vma": False}
    values, specs = (dict(zip(given, part, strict=True)) for part in zip(*given.values(), strict=True))
    return jax.shard_map(lambda values: call(**values), in_specs=(specs,), out_specs=made, **how)(values)


def whole_rows(call: Callable[..., Result], mesh: Mesh | None, *rows: Any) -> Result:
    """call(*rows), every device on whole rows of its own: what is split over model is gathered first."""
    if mesh is None:
        return call(*rows)
    spec = _rows_spec(jax.tree.leaves(rows)[0].shape[0], mesh)
    return jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*rows)


def of_holder(tree: Tree, row: int, mesh: Mesh | None, *, axis: int = 0) -> tuple[Tree, int]:
    """Of arrays with rows along `axis`: the part on the device that holds this row, and the row's place in it."""
    if mesh is None:
        return tree, row
    each = jax.tree.leaves(tree)[0].shape[axis] // mesh.shape["data"]

    def held(leaf: jax.Array) -> jax.Array:
        begins = ((part.index[axis].start or 0, part.data) for part in leaf.addressable_shards)
        return next(data for begin, data in begins if begin == row // each * each)

    return jax.tree.map(held, tree), row % each
