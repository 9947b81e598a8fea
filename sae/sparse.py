"""Sparse codes: k (index, value) pairs per sample, and the products that touch only the rows they name.

Three products share one pattern of indices: `weighted_rows` decodes, `row_dots` encodes the chosen latents, and
`add_rows` is the gradient of both with respect to the matrix. Each is written as gathers that XLA fuses into one loop,
for on CPU a materialized gather of n·k rows costs twenty times the arithmetic, and on GPU a scatter is not repeatable.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

_UNROLL = 32  # gathers fused into one loop; more only lengthens compilation
_BUCKET = 8  # pairs of one latent summed at once by add_rows
_BLOCK = 256  # buckets per turn of its loop
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


def batch_top_k(pre: Float[Array, "batch d_sae"], k: int) -> Float[Array, "batch d_sae"]:
    """The batch·k largest pre-activations of the batch where positive, zero elsewhere; ties go to the lower index."""
    values, places = lax.top_k(pre.reshape(-1), pre.shape[0] * k)
    return jnp.zeros(pre.size, pre.dtype).at[places].set(jax.nn.relu(values)).reshape(pre.shape)


def top_k(values: Float[Array, "batch d_sae"], k: int) -> Int[Array, "batch k"]:
    """Where the k largest of each row stand, largest first, ties to the lower index.

    The k largest lie in the k groups of neighbours with the largest maxima, and a maximum is cheap.
    """
    batch, size = values.shape
    if size % _GROUP or size // _GROUP < 4 * k:
        return lax.top_k(values.astype(jnp.float32), k)[1]  # bf16 would fall back to a full sort on CPU
    groups = values.reshape(batch, size // _GROUP, _GROUP)
    _, chosen = lax.top_k(groups.max(axis=-1).astype(jnp.float32), k)
    chosen = jnp.sort(chosen, axis=-1)
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).astype(jnp.float32)
    _, places = lax.top_k(candidates.reshape(batch, k * _GROUP), k)
    return jnp.take_along_axis(chosen, places // _GROUP, axis=1) * _GROUP + places % _GROUP


def choose(
    x: Float[Array, "batch d_model"],
    encoder: Float[Array, "d_sae d_model"],
    bias: Float32[Array, " d_sae"],
    k: int,
    chunk: int | None = None,
) -> Int[Array, "batch k"]:
    """The k latents of each row with the largest x · encoderᵀ + bias, in the precision of x and encoder.

    The pre-activations of `chunk` rows exist at a time: on CPU they then stay in the cache (512), elsewhere all do.
    """
    if chunk is None:
        chunk = 512 if jax.default_backend() == "cpu" else x.shape[0]

    def rows(x):
        pre = jnp.einsum("bd,sd->bs", x, encoder, preferred_element_type=jnp.float32)
        return top_k(pre + bias[None], k)

    return _by_chunks(rows, chunk, x)


def weighted_rows(
    indices: Int[Array, "*batch k"], values: Float[Array, "*batch k"], table: Float[Array, "d_sae width"]
) -> Float[Array, "*batch width"]:
    """out_b = Σ_i values_bi · table[indices_bi]."""
    k = indices.shape[-1]
    out = _weighted_rows(indices.reshape(-1, k), values.reshape(-1, k), table)
    return out.reshape(*indices.shape[:-1], table.shape[-1])


def row_dots(
    indices: Int[Array, "batch k"], x: Float[Array, "batch width"], table: Float[Array, "d_sae width"]
) -> Float[Array, "batch k"]:
    """out_bi = x_b · table[indices_bi]."""
    return _row_dots(indices, x, table)


def add_rows(
    indices: Int[Array, "batch k"], values: Float[Array, "batch k"], x: Float[Array, "batch width"], d_sae: int
) -> Float[Array, "d_sae width"]:
    """out_j = Σ_{b,i: indices_bi = j} values_bi · x_b: the pairs sorted by latent, then summed in buckets of 8.

    The first bucket of every latent is one fused gather; the few further buckets of often used latents follow in a loop
    as long as there are any. The order of summation is fixed, so the result is the same in every run.
    """
    if not indices.size:
        return jnp.zeros((d_sae, x.shape[-1]), x.dtype)

    # a batched loop would copy its whole carry every turn, so members of a vmap go one after another
    @jax.custom_batching.sequential_vmap
    def sums(indices, values, x):
        return _add_rows(indices, values, x, d_sae)

    return sums(indices, values, x)


def _add_rows(indices: Array, values: Array, x: Array, d_sae: int) -> Array:
    k, pairs = indices.shape[-1], indices.size
    latent, order = lax.sort((indices.reshape(-1), jnp.arange(pairs, dtype=indices.dtype)), num_keys=1)
    start = jnp.searchsorted(latent, jnp.arange(d_sae + 1, dtype=latent.dtype), method="sort").astype(jnp.int32)
    slots = jnp.arange(_BUCKET, dtype=jnp.int32)[None, :]

    def bucket(first, end):
        places = first[:, None] + slots
        pair = order[jnp.minimum(places, pairs - 1)]
        weights = jnp.where(places < end[:, None], values.reshape(-1)[pair], 0)
        return _gathered_sum(pair // k, weights, x)

    further = jnp.maximum(0, start[1:] - start[:-1] - _BUCKET + _BUCKET - 1) // _BUCKET
    ends = jnp.cumsum(further)

    def turn(n, out):
        number = n * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        owner = jnp.minimum(jnp.searchsorted(ends, number, side="right"), d_sae - 1).astype(jnp.int32)
        first = start[owner] + _BUCKET * (1 + number - (ends[owner] - further[owner]))
        end = jnp.where(number < ends[-1], start[owner + 1], 0)
        return out.at[owner].add(bucket(first, end))

    return lax.fori_loop(0, (ends[-1] + _BLOCK - 1) // _BLOCK, turn, bucket(start[:-1], start[1:]))


def _gathered_sum(indices: Array, values: Array, table: Array) -> Array:
    """Unrolled, the gathers become one loop that materializes nothing; einsum over a gather is 15 times slower."""
    out = jnp.zeros((indices.shape[0], table.shape[-1]), table.dtype)
    for i in range(indices.shape[-1]):
        out = out + values[:, i, None] * jnp.take(table, indices[:, i], axis=0, mode="clip")
    return out


@jax.custom_vjp
def _weighted_rows(indices: Array, values: Array, table: Array) -> Array:
    k = indices.shape[-1]
    if k <= _UNROLL:
        return _gathered_sum(indices, values, table)
    pad = ((0, 0), (0, -k % _UNROLL))
    parts = [jnp.moveaxis(jnp.pad(a, pad).reshape(a.shape[0], -1, _UNROLL), 1, 0) for a in (indices, values)]

    def add(out, part):
        return out + _gathered_sum(part[0], part[1], table), None

    return lax.scan(add, jnp.zeros((indices.shape[0], table.shape[-1]), table.dtype), tuple(parts))[0]


def _weighted_rows_forward(indices, values, table):
    return _weighted_rows(indices, values, table), (indices, values, table)


def _weighted_rows_backward(residuals, out_bar):
    indices, values, table = residuals
    return None, _row_dots(indices, out_bar, table), add_rows(indices, values, out_bar, table.shape[0])


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


@jax.custom_vjp
def _row_dots(indices: Array, x: Array, table: Array) -> Array:
    def rows(indices, x):
        return jnp.einsum("bd,bkd->bk", x, jnp.take(table, indices, axis=0, mode="clip"))

    return _by_chunks(rows, 64, indices, x)


def _row_dots_forward(indices, x, table):
    return _row_dots(indices, x, table), (indices, x, table)


def _row_dots_backward(residuals, out_bar):
    indices, x, table = residuals
    return None, _weighted_rows(indices, out_bar, table), add_rows(indices, out_bar, x, table.shape[0])


_row_dots.defvjp(_row_dots_forward, _row_dots_backward)


def _by_chunks(function, chunk: int, *arrays: Array) -> Array:
    batch = arrays[0].shape[0]
    if batch <= chunk:
        return function(*arrays)
    padded = [jnp.pad(a, ((0, -batch % chunk), (0, 0))).reshape(-1, chunk, a.shape[-1]) for a in arrays]
    out = lax.map(lambda part: function(*part), tuple(padded))
    return out.reshape(-1, out.shape[-1])[:batch]
