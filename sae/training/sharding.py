"""Many devices: where a state lies on a mesh of them, rows over `data` and latents over `model`.

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    state = sharding.place(training.init(sharding.place(module, mesh), config, sample), mesh)
    state, metrics = training.run(state, x, config)       # as on one device

A latent's rows of encoder and decoder, its bias, threshold, Adam's moments of them and its silence lie on one device;
what has no latents, on all. JAX's partitioner divides the work (GSPMD, Xu et al. 2021, arXiv 2105.04663). In a step

- over `data`: gradients, d_sae / model · width of encoder and decoder, are added up;
- over `model`: partial reconstructions, batch / data · d_out, are added up;
- TopK chooses a row's k of the k best of every device's latents: batch / data · model · k pairs go over `model`;
- forms that keep k of a batch on average choose so `candidates` of each row (their dense path: none, it keeps all values
  where they are); then 31 counts, one number each, are added up over both axes and give the value of the batch·k-th;
  on the sparse path rows and chosen pairs go over `data`, for a pair may be of any row.

So the chosen latents are those of one device, ties included. Sums are split: what is learned differs in its rounding.
"""

import re
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae.codes import across
from sae.errors import InputError
from sae.forms.abstract import AbstractDictionary
from sae.training.state import TrainState

# path of a leaf -> the axis that its first dimension, after a sweep's members, is divided over; one rule for each leaf
RULES: dict[str, str | None] = {
    r"(module|average|optimizer\.[mn]u)\.(?!(b_dec|skip)$)\w+": across.LATENTS,  # of every form
    r"(module|average|optimizer\.[mn]u)\.(b_dec|skip)": None,
    r"since_fired": across.LATENTS,
    r"optimizer\.count|hyper\.\w+|step|bad_step|(scale|mean)(_out)?": None,
}
Tree = TypeVar("Tree", TrainState, AbstractDictionary)


def place(tree: Tree, mesh: Mesh) -> Tree:
    """A state, a stack of states or a dictionary on a mesh: what is computed with it then runs there."""
    return jax.tree.map(across.placed, tree, shardings(tree, mesh))


def here(module: AbstractDictionary) -> AbstractDictionary:
    """A dictionary whole on a device of this process, where it lies on those of several; all of them call this."""
    mesh = mesh_of(module)
    if mesh is None or not mesh.is_multi_process:
        return module
    whole = jax.device_put(module, NamedSharding(mesh, P()))
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def shardings(tree: TrainState | AbstractDictionary, mesh: Mesh) -> Any:
    """A `NamedSharding` for every array; what its axis does not divide lies on every device, which is logged."""
    across.check(mesh)
    is_state = isinstance(tree, TrainState)
    members = tree.step.ndim if is_state else tree.b_enc.ndim - 1
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    made = []
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        made.append(NamedSharding(mesh, _spec(path if is_state else f"module.{path}", leaf.shape, members, mesh)))
    return jax.tree_util.tree_unflatten(structure, made)


def kept(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same in a compiled program, laid out as `place` does it; so what is donated is written where it lies."""
    return tree if mesh is None else lax.with_sharding_constraint(tree, shardings(tree, mesh))


def mesh_of(tree: TrainState | AbstractDictionary) -> Mesh | None:
    """The mesh that it lies on; None for a single device."""
    return across.mesh_of((tree.module if isinstance(tree, TrainState) else tree).encoder)


def _spec(path: str, shape: tuple[int, ...], members: int, mesh: Mesh) -> P:
    matching = [rule for rule in RULES if re.fullmatch(rule, path)]
    if len(matching) != 1:
        raise InputError(f"{path}: found {len(matching)} rules for it, expected one of sharding.RULES")
    axis = RULES[matching[0]]
    if axis is None or len(shape) == members:
        return P()
    return P(*[None] * members, across.divided(axis, shape[members], mesh))
