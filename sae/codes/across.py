"""Sparse products across the devices of a mesh: rows lie over `data`, latents over `model`.

    with jax.set_mesh(mesh):       # of the axes ("data", "model"); `training.run` does it where a state lies on one
        products.choose(...)

Dense products are left to JAX's partitioner. It would gather a table to take rows of it by index, so these are written
for one device and its part: a device takes the latents that it holds, and sums or choices of all are exchanged.
Without a mesh, or where a size does not divide, everything lies on every device and nothing is exchanged.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from sae import shown
from sae.errors import InputError

AXES = ROWS, LATENTS = "data", "model"
_LOG = logging.getLogger("sae")  # warnings reach stderr unless somebody listens


class Spread(NamedTuple):
    """The axes of the mesh that rows (or pairs) and latents are divided over; None where they are not."""

    rows: str | None
    latents: str | None

    def __repr__(self) -> str:
        return shown.by_field(self)

    def each(self, function: Callable[..., Any], takes: tuple[P, ...], gives: P) -> Callable[..., Any]:
        """The function of every device's part of its arguments; the function itself where nothing is divided."""
        if self == UNDIVIDED:
            return function
        # the loops inside carry sums that differ between devices, which the check of varying axes cannot follow
        return jax.shard_map(function, in_specs=takes, out_specs=gives, check_vma=False)

    def held(self, latents: int) -> int:
        """Latents on each device."""
        return latents if self.latents is None else latents // jax.sharding.get_abstract_mesh().shape[self.latents]

    def own(self, indices: Int[Array, "..."], held: int) -> tuple[Int[Array, "..."], Callable[[Array], Array]]:
        """Indices among the `held` latents of this device, `held` for those of others, and what makes their values 0."""
        if self.latents is None:
            return indices, lambda values: values
        local = indices - lax.axis_index(self.latents) * held
        mine = (local >= 0) & (local < held)
        return jnp.where(mine, local, held), lambda values: jnp.where(mine, values, 0)

    def sum_latents(self, parts: Array) -> Array:
        return parts if self.latents is None else lax.psum(parts, self.latents)

    def sum_rows(self, parts: Array) -> Array:
        return parts if self.rows is None else lax.psum(parts, self.rows)


UNDIVIDED = Spread(None, None)


def spread(rows: int, latents: int) -> Spread:
    """How so many rows and latents are divided over the mesh of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    if not {ROWS, LATENTS} <= set(mesh.axis_names) or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return UNDIVIDED

    def over(axis: str, size: int) -> str | None:
        return axis if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None

    return Spread(over(ROWS, rows), over(LATENTS, latents))


def by_rows(mesh: Mesh, rows: int, axis: int = 0) -> NamedSharding:
    """Of an array whose `axis` counts rows."""
    return NamedSharding(mesh, P(*[None] * axis, divided(ROWS, rows, mesh)))


def placed(array: jax.Array, where: NamedSharding) -> jax.Array:
    """It, there. What every process has whole each gives to its own devices: nothing is sent, nor compared."""
    if where.is_fully_addressable or not array.is_fully_addressable:
        return jax.device_put(array, where)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        words = placed(jax.random.key_data(array), where)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def divided(axis: str, size: int, mesh: Mesh) -> str | None:
    """The axis; None, which is logged, where it does not divide so many rows or latents."""
    check(mesh)
    if size % mesh.shape[axis]:
        what = "latents" if axis == LATENTS else "rows"
        _say_once(f"mesh: {size} {what} are no multiple of {axis}={mesh.shape[axis]}: every device holds all of them")
        return None
    return axis


def check(mesh: Mesh) -> None:
    """Raises for a mesh that nothing here can be divided over."""
    if mesh.axis_names != AXES:
        raise InputError(f"mesh: found axes {mesh.axis_names}, expected {AXES}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise InputError(f"mesh: found axis types {mesh.axis_types}, expected AxisType.Auto of both")


def mesh_of(array: Any) -> Mesh | None:
    """The mesh that an array lies on; None for a single device, and while it is traced."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.axis_names != AXES:
        return None
    return sharding.mesh if isinstance(sharding.mesh, Mesh) else None


@functools.cache
def _say_once(line: str) -> None:
    _LOG.warning(line)
