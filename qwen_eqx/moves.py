"""Moving values without arithmetic. XLA:CPU moves 16-bit floats by converting the whole operand to float32 and back,
a copy of the embedding table or the cache at every step; as integers the same bytes move in place (docs/LOG.md)."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt16

CarryT = TypeVar("CarryT")


def _as_integers(move: Callable[..., Array], *floats: Array) -> Array:
    """`move` applied to the bits of 16-bit floats; other values as they are."""
    if not _is_half(floats[0].dtype):
        return move(*floats)
    return jax.lax.bitcast_convert_type(move(*map(_bits, floats)), floats[0].dtype)


@jax.custom_jvp
def take_rows(table: Float[Array, "vocab d_model"], rows: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
    """table[rows]."""
    return _as_integers(lambda bits: bits[rows], table)


take_rows.defjvps(lambda tangent, _, table, rows: tangent[rows], None)  # bits have no derivative


def write_slice(
    buffer: Num[Array, "*shape"], part: Num[Array, "*part"], at: Int[Array, ""], *, axis: int
) -> Num[Array, "*shape"]:
    """`buffer` with `part` at index `at` of `axis`, in place inside a loop; the part must fit."""

    def write(buffer: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, part, at, axis=axis)

    return _as_integers(write, buffer, part.astype(buffer.dtype))


def read_slice(buffer: Num[Array, "*shape"], at: Int[Array, ""], size: int, *, axis: int) -> Num[Array, "*part"]:
    """`size` entries of `axis` from index `at`."""
    return _as_integers(lambda bits: jax.lax.dynamic_slice_in_dim(bits, at, size, axis=axis), buffer)


def roll(value: Num[Array, "*shape"], by: Int[Array, ""], *, axis: int) -> Num[Array, "*shape"]:
    """Entry i of `axis` goes to (i + by) mod its length."""
    return _as_integers(lambda bits: jnp.roll(bits, by, axis=axis), value)


def while_in_place(
    more: Callable[[CarryT], Bool[Array, ""]], step: Callable[[CarryT], CarryT], carry: CarryT, *, stride: int
) -> CarryT:
    """`while more(carry): carry = step(carry)`, looking every `stride` steps, 16-bit floats carried as their bits.

    Otherwise XLA:CPU copies the cache and the activation buffer at every step to view them as integers.
    """
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, carry)

    def pack(tree):
        return jax.tree.map(lambda leaf: _bits(leaf) if _is_half(leaf.dtype) else leaf, tree)

    def unpack(tree):
        def back(leaf, dtype):
            return jax.lax.bitcast_convert_type(leaf, dtype) if _is_half(dtype) else leaf

        return jax.tree.map(back, tree, dtypes)

    def steps(packed):
        return jax.lax.fori_loop(0, stride, lambda _, inner: pack(step(unpack(inner))), packed)

    return unpack(jax.lax.while_loop(lambda packed: more(unpack(packed)), steps, pack(carry)))


def _is_half(dtype: object) -> bool:  # object: a PRNG key's dtype is none of NumPy's
    return dtype in (jnp.bfloat16, jnp.float16)


def _bits(value: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(value, jnp.uint16)
