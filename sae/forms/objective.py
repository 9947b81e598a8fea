"""What a form's loss is told and what it gives back, and the products that losses are made of."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from sae.forms import losses


class Hyper(eqx.Module):
    """The numbers a sweep may vary without recompiling."""

    learning_rate: Float32[Array, "*members"]
    sparsity: Float32[Array, "*members"]  # weight of L1 (ReLU, Gated) or of L0 (JumpReLU)
    target_l0: Float32[Array, "*members"]  # JumpReLU: 0 weighs L0 itself, else the squared relative miss of each sample
    k: Float32[Array, "*members"]  # forms that keep k latents: how many, at most the form's k
    aux: Float32[Array, "*members"]  # weight of the dead latents' loss
    bandwidth: Float32[Array, "*members"]  # JumpReLU: ε of the straight-through estimators


class Objective(NamedTuple):
    """A loss, and what a step learns from it besides its gradient."""

    loss: Float[Array, ""]
    error: Float[Array, ""]  # mean_b ‖y − ŷ‖²
    fired: Int[Array, " d_sae"]  # samples in which each latent is > 0
    l0: Float[Array, ""]  # latents that are > 0, mean over samples
    smallest: Float[Array, ""]  # least value kept, 0 where none was
    residual: Float[Array, "batch width"] | None  # y − ŷ, several sites side by side

    @classmethod
    def of(
        cls,
        loss: Float[Array, ""],
        y: Float[Array, "batch width"],
        y_hat: Float[Array, "batch width"],
        fired: Int[Array, " d_sae"],
        values: Float[Array, "..."],
    ) -> "Objective":
        """`values`: of the latents kept, in any shape; 0 where none is."""
        smallest = jnp.min(jnp.where(values > 0, values, jnp.inf))
        smallest = jnp.where(jnp.isfinite(smallest), smallest, 0.0)
        l0 = jnp.sum(fired).astype(jnp.float32) / y.shape[0]
        return cls(loss, losses.squared_error(y, y_hat), fired, l0, smallest, y - y_hat)


class Taken(NamedTuple):
    """A step as it was taken: what a form's `settled` is told beside the objective."""

    hyper: Hyper
    good: Bool[Array, ""]  # whether it counts: nothing moves otherwise
    progress: Float[Array, ""]  # the share of all steps that are done
    decay: float  # of running means


class Selection(NamedTuple):
    """The pairs (sample, latent) a batch keeps, chosen by a product that takes no gradient."""

    rows: Int[Array, " pairs"]
    columns: Int[Array, " pairs"]
    kept: Bool[Array, " pairs"]
    overflow: Bool[Array, ""]  # a sample may have needed more candidates than there were


def flat(rows: Float[Array, "rows ..."]) -> Float[Array, "rows width"]:
    """Several sites side by side."""
    return rows.reshape(rows.shape[0], -1)


def count_fired(z: Float[Array, "batch d_sae"]) -> Int[Array, " d_sae"]:
    return jnp.sum((z > 0).astype(jnp.int32), axis=0)


def product(x: Float[Array, "batch inner"], w: Float[Array, "outer inner"], dtype) -> Float[Array, "batch outer"]:
    """x · wᵀ with operands rounded to `dtype`, forward and backward, and float32 sums."""
    return x @ w.T if dtype == jnp.float32 else _rounded_product(dtype)(x, w)


def _rounded_product(dtype):
    def dot(a, b, axes):
        # rounding as a step of its own: fused into the operand it would leave the fast product on CPU
        a, b = lax.optimization_barrier((a.astype(dtype), b.astype(dtype)))
        return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)

    @jax.custom_vjp
    def rounded(x, w):
        return dot(x, w, ((1,), (1,)))

    def backward(residuals, out_bar):
        x, w = residuals
        return dot(out_bar, w, ((1,), (0,))), dot(out_bar, x, ((0,), (0,)))

    rounded.defvjp(lambda x, w: (rounded(x, w), (x, w)), backward)
    return rounded
