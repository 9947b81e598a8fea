"""The activation buffer: written in place, one column of all rows at a time, while the model generates.

XLA:CPU updates a slice of 16-bit floats by rewriting the whole array (to float32 and back), which in a buffer of gigabytes
costs more than the model; a slice of integers it updates in place. There the buffer therefore holds the floats' bits.

XLA:TPU keeps arrays in tiles of their last two axes. A column of all rows is whole tiles if columns stand before rows; if
they do not, the compiler copies the buffer into that order where a loop begins, and back where it ends.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num


class ActivationBuffer(eqx.Module):
    """Activations of each site, row and column; a column is what produced one token, zeros where none was."""

    stored: Num[Array, "sites batch_or_new new_or_batch d_model"]  # `values`, or their bits
    dtype: str = eqx.field(static=True)
    rows_axis: int = eqx.field(static=True)  # 1, or 2 where columns stand before rows

    @classmethod
    def init(
        cls, *, sites: int, batch: int, new: int, d_model: int, dtype: DTypeLike, platform: str | None = None
    ) -> "ActivationBuffer":
        """Zeros, as this platform or else the default one updates them in place."""
        half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        platform = platform or jax.default_backend()
        stored = jnp.uint16 if half and platform == "cpu" else dtype
        shape, axis = ((sites, new, batch, d_model), 2) if platform == "tpu" else ((sites, batch, new, d_model), 1)
        return cls(jnp.zeros(shape, stored), jnp.dtype(dtype).name, axis)

    @property
    def columns_axis(self) -> int:
        return 3 - self.rows_axis

    def write(
        self, values: Float[Array, "sites batch 1 d_model"], live: Bool[Array, " batch"], column: Int[Array, ""]
    ) -> "ActivationBuffer":
        """The buffer with `values` in `column` of the rows that are live: one slice update for the batch."""
        new = values.astype(self.dtype)
        if new.dtype != self.stored.dtype:
            new = jax.lax.bitcast_convert_type(new, self.stored.dtype)
        old = jax.lax.dynamic_slice_in_dim(self.stored, column, 1, axis=self.columns_axis)
        chosen = jnp.where(self._by_rows(live[None, :, None, None]), self._by_rows(new), old)
        stored = jax.lax.dynamic_update_slice_in_dim(self.stored, chosen, column, axis=self.columns_axis)
        return dataclasses.replace(self, stored=stored)

    def first(self, rows: int) -> "ActivationBuffer":
        """So many rows of it."""
        return dataclasses.replace(self, stored=jax.lax.slice_in_dim(self.stored, 0, rows, axis=self.rows_axis))

    def row(self, row: Int[Array, ""], back: Int[Array, ""]) -> Float[Array, "sites new d_model"]:
        """One row's floats, each `back` columns further round; in a trace."""
        held = jax.lax.dynamic_index_in_dim(self.stored, row, self.rows_axis, keepdims=False)
        return jax.lax.bitcast_convert_type(jnp.roll(held, back, axis=1), jnp.dtype(self.dtype))

    def _by_rows(self, array: Array) -> Array:
        """Between `sites batch new d_model` and the order of what is stored."""
        return array if self.rows_axis == 1 else jnp.swapaxes(array, 1, 2)

    @property
    def values(self) -> Float[Array, "*shape"]:
        """The floats, [sites, batch, new, d_model]. Outside a trace, on one CPU, the same memory and no copy."""
        if self.stored.dtype == self.dtype:
            return self._by_rows(self.stored)
        if isinstance(self.stored, Tracer) or len(self.stored.devices()) > 1:
            return self._by_rows(jax.lax.bitcast_convert_type(self.stored, jnp.dtype(self.dtype)))
        floats = np.asarray(self.stored).view(jnp.dtype(self.dtype))
        return jax.device_put(floats, self.stored.sharding, may_alias=True)
