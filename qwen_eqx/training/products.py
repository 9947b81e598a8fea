"""Products whose weights' gradient is as fast as the others: on CPU it reads a transposed copy of the narrower side."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qwen_eqx.model.layers import Linear
from qwen_eqx.model.qwen import Qwen

Rows = Float[Array, "rows d_in"]
Weight = Float[Array, "d_out d_in"]


class Trained(Linear):
    """A Linear for reverse mode alone; its gradients are of the inputs' dtype, rounded before they are multiplied."""

    def __call__(
        self, x: Float[Array, "*batch {self.weight.shape[1]}"]
    ) -> Float32[Array, "*batch {self.weight.shape[0]}"]:
        y = product(x.reshape(-1, x.shape[-1]), self.weight)
        return self.shifted(y.reshape(*x.shape[:-1], self.weight.shape[0]))


def trained(model: Qwen) -> Qwen:
    """The model with `Trained` for every Linear, and for the head where it is the embedding's table."""

    def each(part: Any) -> Any:
        return Trained(part.weight, part.bias) if type(part) is Linear else part

    model = jax.tree.map(each, model, is_leaf=lambda part: type(part) is Linear)
    if model.head is None:
        head = Trained(model.embed.table, None)
        model = eqx.tree_at(lambda m: m.head, model, head, is_leaf=lambda part: part is None)
    return model


@jax.custom_vjp
def product(x: Rows, weight: Weight) -> Float32[Array, "rows d_out"]:
    """y = x Wᵀ, accumulated in float32."""
    return _product(x, weight, 1, 1)


def _forward(x: Rows, weight: Weight) -> tuple[Float32[Array, "rows d_out"], tuple[Rows, Weight]]:
    return product(x, weight), (x, weight)


def _backward(kept: tuple[Rows, Weight], dy: Float32[Array, "rows d_out"]) -> tuple[Rows, Weight]:
    x, weight = kept
    dy = dy.astype(x.dtype)
    dx = _product(dy, weight, 1, 0)
    dw = jax.lax.platform_dependent(x, dy, cpu=_weights_gradient_on_cpu, default=lambda x, dy: _product(dy, x, 0, 0))
    return dx.astype(x.dtype), dw.astype(weight.dtype)


product.defvjp(_forward, _backward)


def _product(a: Array, b: Array, of_a: int, of_b: int) -> Float32[Array, "_ _"]:
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _weights_gradient_on_cpu(x: Rows, dy: Float[Array, "rows d_out"]) -> Float32[Array, "d_out d_in"]:
    """dyᵀ x: a product over rows that strides both sides, a third as fast (docs/LOG.md) as over columns and rows."""
    if dy.shape[1] <= x.shape[1]:
        return _product(_transposed(dy), x, 1, 0)
    # the barrier keeps XLA from writing the small transposition into the product, which its fast kernel then refuses
    return jax.lax.optimization_barrier(_product(_transposed(x), dy, 1, 0)).T


def _transposed(x: Float[Array, "rows width"]) -> Float[Array, "width rows"]:
    """xᵀ as a copy: under a condition, where XLA cannot fold it into the product that reads it."""
    shape = x.shape[::-1]
    return jax.lax.cond(x[0, 0] == x[0, 0], lambda x: x.T, lambda x: jnp.full(shape, jnp.nan, x.dtype), x)
