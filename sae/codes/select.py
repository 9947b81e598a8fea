"""Sparse codes as (index, value) pairs, and the rules that say which latents a sample or a batch keeps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_GROUP = 32  # neighbours compared at once by top_k


class SparseCode(NamedTuple):
    """Latents of each sample as pairs; a pair whose value is 0 did not fire."""

    indices: Int[Array, "*batch k"]
    values: Float[Array, "*batch k"]


def to_dense(code: SparseCode, d_sae: int) -> Float[Array, "*batch d_sae"]:
    """z[…, indices] = values, zero elsewhere."""
    k = code.values.shape[-1]
    indices, values = code.indices.reshape(-1, k), code.values.reshape(-1, k)
    rows = jnp.arange(indices.shape[0])[:, None]
    dense = jnp.zeros((indices.shape[0], d_sae), values.dtype).at[rows, indices].add(values)
    return dense.reshape(*code.values.shape[:-1], d_sae)


def keep_largest(values: Float[Array, "batch slots"], count: Int[Array, ""]) -> Bool[Array, "batch slots"]:
    """Where the `count` largest of all these non-negative values stand; ties go to the earlier place.

    Non-negative floats are ordered as their bits are, so 31 counts find the last value that is kept, bit by bit.
    """
    bits = lax.bitcast_convert_type(values, jnp.int32)

    def refine(n, least):
        higher = least | (jnp.int32(1) << (30 - n))
        return jnp.where(jnp.sum((bits >= higher).astype(jnp.int32)) >= count, higher, least)

    least = lax.fori_loop(0, 31, refine, jnp.int32(0))
    above, tied = bits > least, bits == least
    room = count - jnp.sum(above.astype(jnp.int32))
    # a running count of all places would take longer than the 31 counts: only one row keeps some of its ties, not all
    ties = jnp.sum(tied.astype(jnp.int32), axis=-1)
    upto = jnp.cumsum(ties)
    last = jnp.argmax(upto > room)
    some = jnp.cumsum(tied[last].astype(jnp.int32)) <= room - upto[last] + ties[last]
    here = (jnp.arange(ties.size) == last)[:, None] & some[None]
    return above | (tied & ((upto <= room)[:, None] | here))


def batch_top_k(pre: Float[Array, "batch d_sae"], k: int) -> Float[Array, "batch d_sae"]:
    """The batch·k largest pre-activations of the batch where positive, zero elsewhere; ties go to the lower index."""
    positive = jax.nn.relu(pre)
    return jnp.where(keep_largest(positive, jnp.int32(pre.shape[0] * k)), positive, 0.0)


def top_k(values: Float[Array, "batch d_sae"], k: int) -> SparseCode:
    """The k largest of each row, largest first, ties to the lower index.

    The k largest lie in the k groups of neighbours with the largest maxima, and a maximum is cheap.
    """
    batch, size = values.shape
    if size % _GROUP or size // _GROUP < 4 * k:
        largest, places = lax.top_k(values.astype(jnp.float32), k)  # bf16 would fall back to a full sort on CPU
        return SparseCode(places, largest)
    groups = values.reshape(batch, size // _GROUP, _GROUP)
    _, chosen = lax.top_k(groups.max(axis=-1).astype(jnp.float32), k)
    chosen = jnp.sort(chosen, axis=-1)
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).astype(jnp.float32)
    largest, places = lax.top_k(candidates.reshape(batch, k * _GROUP), k)
    return SparseCode(jnp.take_along_axis(chosen, places // _GROUP, axis=1) * _GROUP + places % _GROUP, largest)
