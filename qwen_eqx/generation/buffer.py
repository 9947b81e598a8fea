"""The activation buffer: written in place, one column of all rows at a time, while the model generates.

XLA:CPU updates a slice of 16-bit floats by rewriting the whole array (to float32 and back), which in a buffer of gigabytes
costs more than the model; a slice of integers it updates in place. There the buffer therefore holds the floats' bits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num


class ActivationBuffer(eqx.Module):
    """Activations of each site, row and column; a column is what produced one token, zeros where none was."""

    stored: Num[Array, "sites batch new d_model"]  # `values`, or their bits
    dtype: str = eqx.field(static=True)

    @classmethod
    def init(
        cls, *, sites: int, batch: int, new: int, d_model: int, dtype: DTypeLike, platform: str | None = None
    ) -> "ActivationBuffer":
        """Zeros, as this platform or else the default one updates them in place."""
        half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        stored = jnp.uint16 if half and (platform or jax.default_backend()) == "cpu" else dtype
        return cls(jnp.zeros((sites, batch, new, d_model), stored), jnp.dtype(dtype).name)

    def write(
        self, values: Float[Array, "sites batch 1 d_model"], live: Bool[Array, " batch"], column: Int[Array, ""]
    ) -> "ActivationBuffer":
        """The buffer with `values` in `column` of the rows that are live: one slice update for the batch."""
        new = values.astype(self.dtype)
        if new.dtype != self.stored.dtype:
            new = jax.lax.bitcast_convert_type(new, self.stored.dtype)
        old = jax.lax.dynamic_slice_in_dim(self.stored, column, 1, axis=2)
        chosen = jnp.where(live[None, :, None, None], new, old)
        return ActivationBuffer(jax.lax.dynamic_update_slice_in_dim(self.stored, chosen, column, axis=2), self.dtype)

    @property
    def values(self) -> Float[Array, "*shape"]:
        """The floats. Outside a trace, on one CPU, the same memory and no copy."""
        if self.stored.dtype == self.dtype:
            return self.stored
        if isinstance(self.stored, Tracer) or len(self.stored.devices()) > 1:
            return jax.lax.bitcast_convert_type(self.stored, jnp.dtype(self.dtype))
        floats = np.asarray(self.stored).view(jnp.dtype(self.dtype))
        return jax.device_put(floats, self.stored.sharding, may_alias=True)
