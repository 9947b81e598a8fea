"""Linear, RMSNorm, Embedding and SwiGLU: the parts a block is made of, on any leading dimensions."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from qwen_eqx.model.sites import BlockTap, unchanged

_FAST_ROWS = 2  # from 2 rows on, XLA:CPU sends a bf16 product to a blocked kernel, 10 times faster than its own loop


def matmul(x: Float[Array, "*batch d_in"], weight: Float[Array, "d_out d_in"]) -> Float32[Array, "*batch d_out"]:
    """y = x Wᵀ, inputs in the model's dtype, accumulated and returned in float32 (docs/numerics.md)."""
    rows = math.prod(x.shape[:-1])
    flat = x.reshape(rows, x.shape[-1])
    if x.dtype == jnp.bfloat16 and rows < _FAST_ROWS:
        product = jax.lax.platform_dependent(flat, weight, cpu=_padded_product, default=_product)
    else:
        product = _product(flat, weight)
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _product(x: Float[Array, "rows d_in"], weight: Float[Array, "d_out d_in"]) -> Float32[Array, "rows d_out"]:
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _padded_product(x: Float[Array, "rows d_in"], weight: Float[Array, "d_out d_in"]) -> Float32[Array, "rows d_out"]:
    padded = jnp.pad(x, ((0, _FAST_ROWS - x.shape[0]), (0, 0)))
    return _product(padded, weight)[: x.shape[0]]


def rounded(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """x in `dtype`, really rounded: XLA drops a cast down and up again, so a value would depend on who else reads it."""
    if jnp.dtype(dtype) == jnp.float32:
        return x.astype(dtype)
    facts = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), facts.nexp, facts.nmant).astype(dtype)


def normal_weight(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Weights drawn from N(0, 0.02²), transformers' `initializer_range`."""
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Linear(eqx.Module):
    """y = x Wᵀ + b, weight laid out as Hugging Face stores it."""

    weight: Float[Array, "d_out d_in"]
    bias: Float[Array, " d_out"] | None

    @classmethod
    def init(cls, d_in: int, d_out: int, *, bias: bool, dtype: DTypeLike, key: PRNGKeyArray) -> "Linear":
        return cls(normal_weight(key, (d_out, d_in), dtype), jnp.zeros(d_out, dtype) if bias else None)

    def __call__(
        self, x: Float[Array, "*batch {self.weight.shape[1]}"]
    ) -> Float32[Array, "*batch {self.weight.shape[0]}"]:
        y = matmul(x, self.weight)
        if self.bias is None:
            return y
        bias = self.bias.astype(jnp.float32)  # added to the float32 accumulator, before it is rounded
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


class RMSNorm(eqx.Module):
    """y = w · x / sqrt(mean(x²) + eps), in float32 (transformers `Qwen2RMSNorm`)."""

    weight: Float[Array, " width"]
    eps: float = eqx.field(static=True)

    @classmethod
    def init(cls, width: int, eps: float, dtype: DTypeLike) -> "RMSNorm":
        return cls(jnp.ones(width, dtype), eps)

    def __call__(
        self, x: Float[Array, "*batch width"], tap: BlockTap = unchanged, name: str = ""
    ) -> Float[Array, "*batch width"]:
        """y; `tap` meets the divisor as NAME_scale and the quotient as NAME_normalized."""
        wide = x.astype(jnp.float32)  # a mean of squares loses bits in bf16
        square = jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps
        root = jnp.sqrt(square)  # computed only where a tap reads it
        scale = tap(f"{name}_scale", root)
        scaled = tap(f"{name}_normalized", wide * jax.lax.rsqrt(square) if scale is root else wide / scale)
        weight = self.weight.astype(jnp.float32)
        return (scaled * weight.reshape((1,) * (x.ndim - 1) + weight.shape)).astype(x.dtype)


class Embedding(eqx.Module):
    """x = table[token]."""

    table: Float[Array, "vocab d_model"]

    @classmethod
    def init(cls, vocab: int, d_model: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> "Embedding":
        return cls(normal_weight(key, (vocab, d_model), dtype))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        # without the barrier XLA:CPU converts the whole table to float32 before a loop that takes a few rows a step
        table, tokens = jax.lax.optimization_barrier((self.table, tokens))
        return table[tokens]


class SwiGLU(eqx.Module):
    """y = W_down (silu(W_gate x) · W_up x) (arXiv 2002.05202; transformers `Qwen2MLP`)."""

    gate: Linear
    up: Linear
    down: Linear

    @classmethod
    def init(cls, d_model: int, d_ff: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> "SwiGLU":
        gate, up, down = jax.random.split(key, 3)
        return cls(
            Linear.init(d_model, d_ff, bias=False, dtype=dtype, key=gate),
            Linear.init(d_model, d_ff, bias=False, dtype=dtype, key=up),
            Linear.init(d_ff, d_model, bias=False, dtype=dtype, key=down),
        )

    def __call__(
        self, x: Float[Array, "batch seq d_model"], tap: BlockTap = unchanged
    ) -> Float[Array, "batch seq d_model"]:
        """y; `tap` meets what the down projection reads."""
        hidden = tap("mlp_post", rounded(jax.nn.silu(self.gate(x)) * self.up(x), x.dtype))
        return rounded(self.down(hidden), x.dtype)
