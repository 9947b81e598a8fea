"""An on-device shuffle buffer: rows go in as a model makes them and come out in random order, never touching the host.

buffer = ShuffleBuffer.init(capacity=65536, d_model=896, key=key)
buffer = buffer.add(rows, keep=not_a_sink(rows))     # rows in the order they were made
buffer, batches = buffer.draw(steps=8, batch=4096)   # `steps batch d_model`, for train.run

The rows of [0, size) are live. `draw` takes a random part of them and closes the gaps, so every row is drawn at most
once, and the buffer is a state like any other: saved in a checkpoint, it continues bit for bit.

On a mesh (`init(mesh=)`) its rows lie over `data`, and the same ones are drawn as on one device. New rows go to all
devices, each of which keeps its own; of a draw each device gives its own, and their sum goes to the devices of its batch.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int32, Key, Num

from sae import shown
from sae.codes import across
from sae.errors import InputError


class ShuffleBuffer(eqx.Module):
    """Live rows in [0, size); `dropped` counts rows that found no room."""

    bits: Num[
        Array, "capacity *sites d_model"
    ]  # the rows; 16-bit floats as integers, for XLA:CPU would convert them all
    source: Int32[Array, " capacity"]  # the number of the `add` that brought each row
    size: Int32[Array, ""]
    adds: Int32[Array, ""]
    dropped: Int32[Array, ""]
    key: Key[Array, ""]
    dtype: jnp.dtype = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        *,
        capacity: int,
        d_model: int,
        key: Key[Array, ""],
        dtype=jnp.float32,
        sites: int | None = None,
        mesh: Mesh | None = None,
    ) -> "ShuffleBuffer":
        """An empty buffer of rows `d_model`, or `sites d_model`, in the activations' own dtype, divided over a mesh."""
        if min(capacity, d_model, 1 if sites is None else sites) < 1:
            raise InputError(f"capacity, d_model, sites: found {capacity}, {d_model}, {sites}, expected at least 1")
        shape = (capacity, d_model) if sites is None else (capacity, sites, d_model)
        where = None if mesh is None else across.by_rows(mesh, capacity)
        # distinct arrays, for `add` and `draw` donate the whole buffer
        made = cls(
            bits=jnp.zeros(shape, jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype, device=where),
            source=jnp.zeros(capacity, jnp.int32, device=where),
            size=jnp.array(0, jnp.int32),
            adds=jnp.array(0, jnp.int32),
            dropped=jnp.array(0, jnp.int32),
            key=jax.random.clone(key),
            dtype=jnp.dtype(dtype),
        )
        return made if mesh is None else jax.tree.map(across.placed, made, _places(made, mesh))

    def __repr__(self) -> str:
        return shown.by_field(self)

    @property
    def capacity(self) -> int:
        return self.bits.shape[0]

    @property
    def mesh(self) -> Mesh | None:
        """What the rows are divided over; None for one device."""
        return across.mesh_of(self.bits)

    @property
    def rows(self) -> Float[Array, "capacity *sites d_model"]:
        """All of them, in `dtype`; those of [0, size) are live."""
        return lax.bitcast_convert_type(self.bits, self.dtype)

    def add(self, rows: Float[Array, "new *sites d_model"], keep: Bool[Array, " new"] | None = None) -> "ShuffleBuffer":
        """The buffer with the kept rows behind the live ones; rows beyond the capacity are dropped and counted."""
        wanted = jnp.ones(rows.shape[0], bool) if keep is None else keep
        if self.mesh is not None:  # one device may have made them, or the devices of another mesh
            where = across.by_rows(self.mesh, len(rows))
            rows, wanted = across.placed(rows, where), across.placed(wanted, where)
        return _add(Addition(rows, wanted, self.mesh), self)

    def draw(self, *, steps: int, batch: int) -> tuple["ShuffleBuffer", Float[Array, "steps batch *sites d_model"]]:
        """A uniform sample of the live rows without replacement, which leaves the buffer."""
        buffer, rows, _ = self.draw_with_source(steps=steps, batch=batch)
        return buffer, rows

    def draw_with_source(
        self, *, steps: int, batch: int
    ) -> tuple["ShuffleBuffer", Float[Array, "steps batch *sites d_model"], Int32[Array, "steps batch"]]:
        """`draw`, with the number of the `add` that brought each row, from which `mixing` is measured."""
        wanted, live = steps * batch, int(self.size)
        if wanted > live:
            raise InputError(f"draw: found {live} rows in the buffer, expected at least steps × batch = {wanted}")
        return _draw(Drawing(steps, batch, self.mesh), self)


def not_a_sink(rows: Float[Array, "rows d_model"], times: float = 10.0) -> Bool[Array, " rows"]:
    """‖row‖ ≤ times · median ‖row‖, and finite: attention sinks stand at 100 to 1000 times the median."""
    norms = jnp.linalg.norm(rows.astype(jnp.float32), axis=-1)
    median = jnp.nanmedian(jnp.where(jnp.isfinite(norms), norms, jnp.nan))
    return jnp.isfinite(norms) & (norms <= times * median)


def mixing(source: Int32[Array, "steps batch"]) -> Float[Array, ""]:
    """P(two rows of a batch differ in source) / P(two of all the rows drawn do), mean over batches.

    1 is a perfect mixture, 0 is batches of one source each.
    """
    within = jnp.mean(jax.vmap(_differ)(source))
    overall = _differ(source.reshape(-1))
    return jnp.where(overall > 0, within / jnp.where(overall > 0, overall, 1.0), 1.0)


def _differ(source: Int32[Array, " rows"]) -> Float[Array, ""]:
    count = source.shape[0]
    ordered = jnp.sort(source)
    first = jnp.searchsorted(ordered, ordered, side="left")
    last = jnp.searchsorted(ordered, ordered, side="right")
    same = jnp.sum((last - first - 1).astype(jnp.float32))
    return 1.0 - same / max(1, count * (count - 1))


class Addition(NamedTuple):
    """Rows on their way into a buffer, and which of them are wanted."""

    rows: Float[Array, "new *sites d_model"]
    keep: Bool[Array, " new"]
    mesh: Mesh | None


class Drawing(NamedTuple):
    """What is wanted of a buffer."""

    steps: int
    batch: int
    mesh: Mesh | None


@eqx.filter_jit(donate="all-except-first")
def _add(new: Addition, buffer: ShuffleBuffer) -> ShuffleBuffer:
    rows, keep, mesh = new
    place = buffer.size + jnp.cumsum(keep.astype(jnp.int32)) - 1
    place = jnp.where(keep & (place < buffer.capacity), place, buffer.capacity)  # out of bounds: dropped by the scatter
    kept = jnp.sum(keep.astype(jnp.int32))
    size = jnp.minimum(buffer.size + kept, buffer.capacity)
    added = ShuffleBuffer(
        bits=buffer.bits.at[place].set(_bits(rows.astype(buffer.dtype)), mode="drop"),
        source=buffer.source.at[place].set(buffer.adds, mode="drop"),
        size=size,
        adds=buffer.adds + 1,
        dropped=buffer.dropped + buffer.size + kept - size,
        key=buffer.key,
        dtype=buffer.dtype,
    )
    return _where_it_was(added, mesh)


@eqx.filter_jit(donate="all-except-first")
def _draw(drawing: Drawing, buffer: ShuffleBuffer) -> tuple[ShuffleBuffer, Array, Array]:
    steps, batch, mesh = drawing
    wanted = steps * batch
    key, now = jax.random.split(buffer.key)
    places = jnp.arange(buffer.capacity, dtype=jnp.int32)
    rank = jnp.where(places < buffer.size, jax.random.uniform(now, (buffer.capacity,)), 2.0)  # dead rows sort last
    chosen = jnp.argsort(rank)[:wanted].astype(jnp.int32)
    size = buffer.size - wanted
    gone = jnp.zeros(buffer.capacity, bool).at[chosen].set(True)
    # the survivors of the tail move into the gaps below the new size: at most `wanted` rows are copied
    gaps = jnp.nonzero(gone & (places < size), size=wanted, fill_value=buffer.capacity)[0]
    tail = ~gone & (places >= size) & (places < buffer.size)
    movers = jnp.nonzero(tail, size=wanted, fill_value=0)[0]
    rows, source = lax.bitcast_convert_type(buffer.bits[chosen], buffer.dtype), buffer.source[chosen]
    moved = ShuffleBuffer(
        bits=buffer.bits.at[gaps].set(lax.optimization_barrier(buffer.bits[movers]), mode="drop"),
        source=buffer.source.at[gaps].set(buffer.source[movers], mode="drop"),
        size=size,
        adds=buffer.adds,
        dropped=buffer.dropped,
        key=key,
        dtype=buffer.dtype,
    )
    rows, source = rows.reshape(steps, batch, *rows.shape[1:]), source.reshape(steps, batch)
    if mesh is not None:
        rows = lax.with_sharding_constraint(rows, across.by_rows(mesh, batch, 1))
    return _where_it_was(moved, mesh), rows, source


def _places(buffer: ShuffleBuffer, mesh: Mesh) -> ShuffleBuffer:
    """Where on a mesh each of its arrays lies."""
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), buffer)
    return eqx.tree_at(lambda b: (b.bits, b.source), everywhere, (across.by_rows(mesh, buffer.capacity),) * 2)


def _where_it_was(buffer: ShuffleBuffer, mesh: Mesh | None) -> ShuffleBuffer:
    """Or what was donated could not be written in place."""
    return buffer if mesh is None else lax.with_sharding_constraint(buffer, _places(buffer, mesh))


def _bits(rows: Array) -> Array:
    return lax.bitcast_convert_type(rows, jnp.uint16) if rows.dtype.itemsize == 2 else rows
