"""Products with sparse codes, which touch only the rows that the codes name.

Three products share one pattern of indices: `weighted_rows` decodes, `row_dots` encodes the chosen latents, `add_rows`
is the gradient of both with respect to the matrix; `pair_…` are the same for unequally many latents per sample. Each is
written as gathers that XLA fuses into one loop, for on CPU a materialized gather of n·k rows costs twenty times the
arithmetic, and on GPU a scatter is not repeatable.

On a mesh (`across`) every device works on its own latents and rows. `choose` sends the k best of each device's latents
to the others of its row; sums over latents are added up over `model`, sums over samples over `data`, and of pairs,
which belong to any sample, x itself goes to all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from sae.codes import across
from sae.codes.select import SparseCode, top_k

_UNROLL = 32  # gathers fused into one loop; more only lengthens compilation
_BUCKET = 8  # pairs of one latent summed at once by add_rows
_BLOCK = 256  # buckets per turn of its loop


def choose(
    x: Float[Array, "batch d_model"],
    encoder: Float[Array, "d_sae d_model"],
    bias: Float32[Array, " d_sae"],
    k: int,
    chunk: int | None = None,
) -> SparseCode:
    """The k latents of each row with the largest x · encoderᵀ + bias, in the precision of x and encoder.

    The pre-activations of `chunk` rows exist at a time: on CPU they then stay in the cache (512), elsewhere all do.
    """
    there = across.spread(x.shape[0], encoder.shape[0])

    def here(x, encoder, bias):
        def rows(x):
            pre = jnp.einsum("bd,sd->bs", x, encoder, preferred_element_type=jnp.float32)
            return top_k(pre + bias[None], min(k, bias.size))

        size = chunk or (512 if jax.default_backend() == "cpu" else x.shape[0])
        return _best_of_all(there, _by_chunks(rows, size, x), bias.size, k)

    by_row, by_latent = P(there.rows), P(there.latents)
    return there.each(here, (by_row, by_latent, by_latent), by_row)(x, encoder, bias)


def _best_of_all(there: across.Spread, own: SparseCode, held: int, k: int) -> SparseCode:
    """The k best of every device's best; they come in the order of their latents, so ties go to the lower index still."""
    if there.latents is None:
        return own
    indices = own.indices + lax.axis_index(there.latents) * held
    indices, values = (lax.all_gather(part, there.latents, axis=1, tiled=True) for part in (indices, own.values))
    values, places = lax.top_k(values, k)
    return SparseCode(jnp.take_along_axis(indices, places, axis=1), values)


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
    """out_j = Σ_{b,i: indices_bi = j} values_bi · x_b."""
    there, k = across.spread(indices.shape[0], d_sae), indices.shape[-1]

    def here(indices, values, x):
        rows = jnp.repeat(jnp.arange(indices.shape[0], dtype=indices.dtype), k)
        owners, _ = there.own(indices.reshape(-1), held)
        return there.sum_rows(_pair_sum(owners, rows, values.reshape(-1), x, held))

    held, by_row = there.held(d_sae), P(there.rows)
    return there.each(here, (by_row, by_row, by_row), P(there.latents))(indices, values, x)


def pair_dots(
    rows: Int[Array, " pairs"],
    columns: Int[Array, " pairs"],
    x: Float[Array, "batch width"],
    table: Float[Array, "d_sae width"],
) -> Float[Array, " pairs"]:
    """out_p = x[rows_p] · table[columns_p]: the chosen latents of a batch whose samples fire unequally many."""
    return _pair_dots(rows, columns, x, table)


def pair_rows(
    rows: Int[Array, " pairs"],
    columns: Int[Array, " pairs"],
    values: Float[Array, " pairs"],
    table: Float[Array, "d_sae width"],
    batch: int,
) -> Float[Array, "batch width"]:
    """out_b = Σ_{p: rows_p = b} values_p · table[columns_p]."""
    return _pair_rows(batch, rows, columns, values, table)


def _pair_sum(owners: Array, others: Array, values: Array, table: Array, size: int) -> Array:
    """out_o = Σ_{p: owners_p = o} values_p · table[others_p]: the pairs sorted by owner, then summed in buckets of 8.

    A pair whose owner is `size` belongs to none.

    The first bucket of every owner is one fused gather; the few further buckets of often named owners follow in a loop
    as long as there are any. The order of summation is fixed, so the result is the same in every run.
    """

    # a batched loop would copy its whole carry every turn, so members of a vmap go one after another
    @jax.custom_batching.sequential_vmap
    def total(owners, others, values, table):
        return _bucket_sums(owners, others, values, table, size)

    return total(owners, others, values, table)


def _bucket_sums(owners: Array, others: Array, values: Array, table: Array, size: int) -> Array:
    pairs = owners.size
    order = _stable_order(owners, size + 1)
    counts = jnp.zeros(size, jnp.int32).at[owners].add(1)
    ends = jnp.cumsum(counts)
    slots = jnp.arange(_BUCKET, dtype=jnp.int32)[None, :]

    def bucket(first, end):
        places = first[:, None] + slots
        pair = order[jnp.minimum(places, pairs - 1)]
        weights = jnp.where(places < end[:, None], values[pair], 0)
        return _gathered_sum(others[pair], weights, table)

    further = jnp.maximum(0, counts - 1) // _BUCKET
    last = jnp.cumsum(further)

    def turn(n, out):
        number = n * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)
        owner = jnp.minimum(jnp.searchsorted(last, number, side="right"), size - 1).astype(jnp.int32)
        first = ends[owner] - counts[owner] + _BUCKET * (1 + number - (last[owner] - further[owner]))
        end = jnp.where(number < last[-1], ends[owner], 0)
        return out.at[owner].add(bucket(first, end))

    return lax.fori_loop(0, (last[-1] + _BLOCK - 1) // _BLOCK, turn, bucket(ends - counts, ends))


def _stable_order(keys: Array, size: int) -> Array:
    """argsort of keys below `size`; packed with the place into one word where that fits, five times faster on CPU."""
    count = keys.size
    places = jnp.arange(count, dtype=jnp.uint32)
    if size * count < 2**32:
        packed = jnp.sort(keys.astype(jnp.uint32) * jnp.uint32(count) + places)
        return (packed % jnp.uint32(count)).astype(jnp.int32)
    return lax.sort((keys, places.astype(jnp.int32)), num_keys=1)[1]


def _gathered_sum(indices: Array, values: Array, table: Array) -> Array:
    """Unrolled, the gathers become one loop that materializes nothing; einsum over a gather is 15 times slower."""
    out = jnp.zeros((indices.shape[0], table.shape[-1]), table.dtype)
    for i in range(indices.shape[-1]):
        out = out + values[:, i, None] * jnp.take(table, indices[:, i], axis=0, mode="clip")
    return out


def _sum_of_rows(indices: Array, values: Array, table: Array) -> Array:
    # a loop even where one turn would do: XLA on CPU repeats the gathers for every use of a sum that it can fuse
    k = indices.shape[-1]
    turns = max(2, -(-k // _UNROLL))
    pad = ((0, 0), (0, -k % turns))
    parts = [jnp.moveaxis(jnp.pad(a, pad).reshape(a.shape[0], turns, -1), 1, 0) for a in (indices, values)]

    def add(out, part):
        return out + _gathered_sum(part[0], part[1], table), None

    return lax.scan(add, jnp.zeros((indices.shape[0], table.shape[-1]), table.dtype), tuple(parts))[0]


@jax.custom_vjp
def _weighted_rows(indices: Array, values: Array, table: Array) -> Array:
    there = across.spread(indices.shape[0], table.shape[0])

    def here(indices, values, table):
        local, own = there.own(indices, table.shape[0])
        return there.sum_latents(_sum_of_rows(local, own(values), table))

    by_row = P(there.rows)
    return there.each(here, (by_row, by_row, P(there.latents)), by_row)(indices, values, table)


def _weighted_rows_forward(indices, values, table):
    return _weighted_rows(indices, values, table), (indices, values, table)


def _weighted_rows_backward(residuals, out_bar):
    indices, values, table = residuals
    return None, _row_dots(indices, out_bar, table), add_rows(indices, values, out_bar, table.shape[0])


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


@jax.custom_vjp
def _row_dots(indices: Array, x: Array, table: Array) -> Array:
    there = across.spread(indices.shape[0], table.shape[0])

    def here(indices, x, table):
        def rows(indices, x):
            return jnp.einsum("bd,bkd->bk", x, jnp.take(table, indices, axis=0, mode="clip"))

        local, own = there.own(indices, table.shape[0])
        return there.sum_latents(own(_by_chunks(rows, 64, local, x)))

    by_row = P(there.rows)
    return there.each(here, (by_row, by_row, P(there.latents)), by_row)(indices, x, table)


def _row_dots_forward(indices, x, table):
    return _row_dots(indices, x, table), (indices, x, table)


def _row_dots_backward(residuals, out_bar):
    indices, x, table = residuals
    return None, _weighted_rows(indices, out_bar, table), add_rows(indices, out_bar, x, table.shape[0])


_row_dots.defvjp(_row_dots_forward, _row_dots_backward)


def _of_rows(batch: int, rows: Array, columns: Array, values: Array, table: Array) -> Array:
    """out_b = Σ_{p: rows_p = b} values_p · table[columns_p]; a device's pairs may be of any sample."""
    there = across.spread(rows.shape[0], table.shape[0])

    def here(rows, columns, values, table):
        local, own = there.own(columns, table.shape[0])
        return there.sum_rows(there.sum_latents(_pair_sum(rows, local, own(values), table, batch)))

    by_pair = P(there.rows)
    return there.each(here, (by_pair, by_pair, by_pair, P(there.latents)), P())(rows, columns, values, table)


def _of_latents(rows: Array, columns: Array, values: Array, x: Array, d_sae: int) -> Array:
    """out_j = Σ_{p: columns_p = j} values_p · x[rows_p]."""
    there = across.spread(rows.shape[0], d_sae)

    def here(rows, columns, values, x):
        owners, _ = there.own(columns, held)
        return there.sum_rows(_pair_sum(owners, rows, values, x, held))

    held, by_pair = there.held(d_sae), P(there.rows)
    return there.each(here, (by_pair, by_pair, by_pair, P()), P(there.latents))(rows, columns, values, x)


@jax.custom_vjp
def _pair_dots(rows: Array, columns: Array, x: Array, table: Array) -> Array:
    there = across.spread(rows.shape[0], table.shape[0])

    def here(rows, columns, x, table):
        def some(pairs):
            chosen = jnp.take(table, pairs[:, 1], axis=0, mode="clip")
            return jnp.einsum("pw,pw->p", jnp.take(x, pairs[:, 0], axis=0, mode="clip"), chosen)[:, None]

        local, own = there.own(columns, table.shape[0])
        return there.sum_latents(own(_by_chunks(some, 2048, jnp.stack([rows, local], axis=-1))[:, 0]))

    by_pair = P(there.rows)
    return there.each(here, (by_pair, by_pair, P(), P(there.latents)), by_pair)(rows, columns, x, table)


def _pair_dots_forward(rows, columns, x, table):
    return _pair_dots(rows, columns, x, table), (rows, columns, x, table)


def _pair_dots_backward(residuals, out_bar):
    rows, columns, x, table = residuals
    x_bar = _of_rows(x.shape[0], rows, columns, out_bar, table)
    return None, None, x_bar, _of_latents(rows, columns, out_bar, x, table.shape[0])


_pair_dots.defvjp(_pair_dots_forward, _pair_dots_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pair_rows(batch: int, rows: Array, columns: Array, values: Array, table: Array) -> Array:
    return _of_rows(batch, rows, columns, values, table)


def _pair_rows_forward(batch, rows, columns, values, table):
    return _of_rows(batch, rows, columns, values, table), (rows, columns, values, table)


def _pair_rows_backward(batch, residuals, out_bar):
    rows, columns, values, table = residuals
    table_bar = _of_latents(rows, columns, values, out_bar, table.shape[0])
    return None, None, _pair_dots(rows, columns, out_bar, table), table_bar


_pair_rows.defvjp(_pair_rows_forward, _pair_rows_backward)


def _by_chunks(function: Callable[..., Any], chunk: int, *arrays: Array) -> Any:
    batch = arrays[0].shape[0]
    if batch <= chunk:
        return function(*arrays)
    padded = [jnp.pad(a, ((0, -batch % chunk), (0, 0))).reshape(-1, chunk, a.shape[-1]) for a in arrays]
    out = lax.map(lambda part: function(*part), tuple(padded))
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1])[:batch], out)
