"""Sparse codes: k (index, value) pairs per sample, and the products that touch only the rows they name."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


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


def weighted_rows(
    indices: Int[Array, "*batch k"], values: Float[Array, "*batch k"], table: Float[Array, "d_sae width"]
) -> Float[Array, "*batch width"]:
    """out_b = Σ_i values_bi · table[indices_bi]."""
    rows = jnp.take(table, indices, axis=0, mode="clip")
    return jnp.einsum("...k,...kw->...w", values, rows, preferred_element_type=jnp.float32)
