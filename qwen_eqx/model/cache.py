"""The key/value cache: fixed size, one pair of leaves per layer, one write index for the whole batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qwen_eqx.model.config import QwenConfig


class LayerCache(eqx.Module):
    """Keys (already rotated) and values of one layer; entry s holds the token written there last."""

    keys: Float[Array, "batch kv_heads kv_seq d_head"]
    values: Float[Array, "batch kv_heads kv_seq d_head"]

    def write(self, new: "LayerCache", entry: Int[Array, ""] | int) -> "LayerCache":
        """Puts `new`'s positions at `entry` and after, one slice update for all rows; they must fit without wrapping."""

        def put(old: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, part.astype(old.dtype), entry, axis=2)

        return jax.tree.map(put, self, new)


class KVCache(eqx.Module):
    """A ring of entries shared by all rows: a row's tokens are the last `length[row]` written before `index`."""

    layers: tuple[LayerCache, ...]  # separate leaves, so that each is updated in place
    index: Int[Array, ""]  # tokens ever written; the next one goes to entry index % kv_seq
    length: Int[Array, " batch"]  # tokens each row holds = the position of its next one; negative: pads still to come

    @classmethod
    def init(cls, config: QwenConfig, *, batch: int, kv_seq: int, dtype: DTypeLike) -> "KVCache":
        """An empty cache of `cache_bytes(config, batch, kv_seq, dtype)` bytes."""
        shape = (batch, config.kv_heads, kv_seq, config.d_head)
        layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))
        return cls(layers, jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32))

    @property
    def kv_seq(self) -> int:
        return self.layers[0].keys.shape[2]

    def positions(self, seq: int) -> Int[Array, "batch {seq}"]:
        """Positions of the next `seq` tokens of each row."""
        return self.length[:, None] + jnp.arange(seq, dtype=jnp.int32)[None, :]

    def grown(self, into: "KVCache") -> "KVCache":
        """This cache with entries and dtype of `into`, an empty one with more entries."""
        layers = jax.tree.map(
            lambda part, room: jnp.pad(
                part.astype(room.dtype), ((0, 0), (0, 0), (0, room.shape[2] - part.shape[2]), (0, 0))
            ),
            self.layers,
            into.layers,
        )
        return KVCache(layers, self.index, self.length)


def visible(
    positions: Int[Array, "batch seq"], index: Int[Array, ""] | int, kv_seq: int
) -> Bool[Array, "batch seq {kv_seq}"]:
    """Which entries a query may read: those at most `position` steps older than its own.

    age[i, s] = (index + i − s) mod kv_seq; visible iff age ≤ position. The one formula covers causality (younger entries
    have wrapped to a great age), left padding (older entries are none of the row's own) and the ring; a pad query sees none.
    """
    seq = positions.shape[1]
    own = index + jnp.arange(seq, dtype=jnp.int32)
    age = (own[:, None] - jnp.arange(kv_seq, dtype=jnp.int32)[None, :]) % kv_seq
    return age[None, :, :] <= positions[:, :, None]


def cache_bytes(config: QwenConfig, *, batch: int, kv_seq: int, dtype: DTypeLike) -> int:
    """2 · layers · batch · kv_heads · kv_seq · d_head · bytes per value."""
    return 2 * config.layers * batch * config.kv_heads * kv_seq * config.d_head * jnp.dtype(dtype).itemsize
