"""Many devices: a state fully sharded over a mesh, its batches over `data`.

    state = sharding.place(training.init(model, config), mesh)
    state, metrics = training.run(state, batches, config)     # as on one device

Each device holds its part of the weights and of the optimizer's state, d_model over `data` and heads, d_ff and vocab over
`model` (FULLY_SHARDED of `qwen_eqx.sharding`). A step gathers each weight over `data` in the dtype that it computes in,
and adds up gradients over `data` to where their weight lies (ZeRO-3, Rajbhandari et al. 2019, arXiv 1910.02054).
"""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_eqx import sharding
from qwen_eqx.sharding import FULLY_SHARDED, TENSOR
from qwen_eqx.training.lora import is_lora

Tree = TypeVar("Tree")


def place(state: Tree, mesh: Mesh) -> Tree:
    """A TrainState on a mesh: it trains there. What an axis does not divide lies on every device, which is logged."""
    sharding.say_what_is_not_split(state.model.config, mesh, FULLY_SHARDED)  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree.map(sharding.placed, state, shardings(state, mesh))


def shardings(state: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every array: the optimizer's beside the parameter that they are of, the rest on every device."""
    named = jax.tree_util.tree_leaves_with_path(_of_model(state.model, mesh, FULLY_SHARDED))
    parameters = {_path(keys): where for keys, where in named}

    def of_leaf(keys: tuple[Any, ...], leaf: Any) -> Any:
        words = _path(keys).split(".")
        found = (parameters.get(".".join(words[at:])) for at in range(len(words)))
        return next((where for where in found if where is not None and leaf.ndim), NamedSharding(mesh, P()))

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def kept(state: Tree, mesh: Mesh | None) -> Tree:
    """The same in a compiled program, laid out as `place` does it; so what is donated is written where it lies."""
    return state if mesh is None else lax.with_sharding_constraint(state, shardings(state, mesh))


def gathered(model: Tree, mesh: Mesh | None) -> Tree:
    """A model that computes, in a compiled program: every weight whole over `data`, where rows are."""
    return model if mesh is None else lax.with_sharding_constraint(model, _of_model(model, mesh, TENSOR))


def place_batch(batch: Tree, mesh: Mesh, axis: int) -> Tree:
    """Arrays whose `axis` counts documents, dealt to the devices."""
    documents = jax.tree.leaves(batch)[0].shape[axis]
    return jax.tree.map(functools.partial(sharding.placed, where=by_documents(mesh, documents, axis)), batch)


def by_documents(mesh: Mesh, documents: int, axis: int) -> NamedSharding:
    """Of an array whose `axis` counts documents; on every device whole if they cannot be divided."""
    divides = documents % mesh.shape["data"] == 0
    return NamedSharding(mesh, P(*[None] * axis, "data" if divides else None))


def _of_model(model: Any, mesh: Mesh, over: Mapping[str, str]) -> Any:
    """A `NamedSharding` for every array of a model; the thin matrices of a LoRA lie as their sides of its weight do."""
    plain = jax.tree.map(lambda part: part.linear if is_lora(part) else part, model, is_leaf=is_lora)

    def beside(part: Any, where: Any) -> Any:
        if not is_lora(part):
            return where
        out, into = (*where.weight.spec, None, None)[:2]
        thin = NamedSharding(mesh, P(None, into)), NamedSharding(mesh, P(out, None))
        return eqx.tree_at(lambda lora: (lora.linear, lora.a, lora.b), part, (where, *thin))

    return jax.tree.map(beside, model, sharding.shardings(plain, mesh, over=over), is_leaf=is_lora)


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")
