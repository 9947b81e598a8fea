"""Sparse codes as (index, value) pairs, and the rules that say which latents a sample or a batch keeps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from sae import shown
from sae.codes import across

_GROUP = 32  # neighbours compared at once by top_k


class SparseCode(NamedTuple):
    """Latents of each sample as pairs; a pair whose value is 0 did not fire."""

    indices: Int[Array, "*batch k"]
    values: Float[Array, "*batch k"]

    def __repr__(self) -> str:
        return shown.by_field(self)


def to_dense(code: SparseCode, d_sae: int) -> Float[Array, "*batch d_sae"]:
    """z[…, indices] = values, zero elsewhere."""
    k = code.values.shape[-1]
    indices, values = code.indices.reshape(-1, k), code.values.reshape(-1, k)
    rows = jnp.arange(indices.shape[0])[:, None]
    dense = jnp.zeros((indices.shape[0], d_sae), values.dtype).at[rows, indices].add(values)
    return dense.reshape(*code.values.shape[:-1], d_sae)


def keep_largest(values: Float[Array, "batch candidates"], count: Int[Array, ""]) -> Bool[Array, "batch candidates"]:
    """Where the `count` largest of all these non-negative values stand; ties go to the earlier place.

    Non-negative floats are ordered as their bits are, so counting bits finds the last value that is kept.
    """
    bits = lax.bitcast_convert_type(values, jnp.int32)
    # on a mesh what is exchanged counts, and a histogram's flat places would take all values to every device
    alone = across.spread(*values.shape) == across.UNDIVIDED
    quick = alone and jax.default_backend() == "cpu"
    least = _by_histograms(bits, count) if quick else _bit_by_bit(bits, count)
    above, tied = bits > least, bits == least
    room = count - jnp.sum(above.astype(jnp.int32))
    # a running count of all places would take longer than all of that: only one row keeps some of its ties, not all
    ties = jnp.sum(tied.astype(jnp.int32), axis=-1)
    upto = jnp.cumsum(ties)
    last = jnp.argmax(upto > room)
    here = (jnp.arange(ties.size) == last)[:, None]
    row = tied[last] if alone else jnp.any(tied & here, axis=0)  # a row that one device has would bring all rows
    some = jnp.cumsum(row.astype(jnp.int32)) <= room - upto[last] + ties[last]
    here = here & some[None]
    return above | (tied & ((upto <= room)[:, None] | here))


def _bit_by_bit(bits: Int[Array, "batch candidates"], count: Int[Array, ""]) -> Int[Array, ""]:
    """The largest b that at least `count` of these are not below, or 0: 31 counts, each a plain sum."""

    def refine(n, least):
        higher = least | (jnp.int32(1) << (30 - n))
        return jnp.where(jnp.sum((bits >= higher).astype(jnp.int32)) >= count, higher, least)

    return lax.fori_loop(0, 31, refine, jnp.int32(0))


def _by_histograms(bits: Int[Array, "batch candidates"], count: Int[Array, ""]) -> Int[Array, ""]:
    """As `_bit_by_bit`, eleven bits at a time: four times faster on CPU; on a GPU all zeros would meet in one bin."""
    least, above = jnp.int32(0), jnp.int32(0)  # `above`: how many are beyond all that begin as `least` does
    for shift, width in ((20, 11), (9, 11), (0, 9)):
        bins = 2**width
        inside = (bits >> (shift + width)) == (least >> (shift + width))
        place = jnp.where(inside, (bits >> shift) & (bins - 1), bins)
        sizes = jnp.zeros(bins + 1, jnp.int32).at[place.reshape(-1)].add(1)[:bins]
        upto = above + jnp.cumsum(sizes[::-1])[::-1]  # not below each bin
        digit = jnp.maximum(jnp.sum((upto >= count).astype(jnp.int32)) - 1, 0)
        above = upto[digit] - sizes[digit]
        least = least | (digit << shift)
    return least


def kth_largest(values: Float[Array, "batch candidates"], k: int) -> Float[Array, "batch 1"]:
    """Of each row the k-th largest, or the smallest of fewer."""
    there = across.spread(values.shape[0], 1)

    def here(values):
        largest, _ = lax.top_k(values, min(k, values.shape[-1]))
        return jnp.min(largest, axis=-1, keepdims=True)  # not the last column: slicing it out makes XLA sort whole rows

    return there.each(here, (P(there.rows),), P(there.rows))(values)


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
