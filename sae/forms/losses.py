"""Losses that several forms share, as pure functions: each with its formula, its source, and a test against NumPy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sae.codes.select import kth_largest


def squared_error(x: Float[Array, "batch d_out"], x_hat: Float[Array, "batch d_out"]) -> Float[Array, ""]:
    """mean_b ‖x_b − x̂_b‖²; lower is better."""
    return jnp.mean(jnp.sum(jnp.square(x - x_hat), axis=-1))


def fvu(x: Float[Array, "batch d_out"], x_hat: Float[Array, "batch d_out"]) -> Float[Array, ""]:
    """Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖²; lower is better, 0 where the input does not vary."""
    total = jnp.sum(jnp.square(x - jnp.mean(x, axis=0, keepdims=True)))
    error = jnp.sum(jnp.square(x - x_hat))
    return jnp.where(total > 0, error / jnp.where(total > 0, total, 1.0), 0.0)


def l0(z: Float[Array, "batch d_sae"]) -> Float[Array, ""]:
    """Mean number of latents with z > 0 per sample."""
    return jnp.mean(jnp.sum((z > 0).astype(jnp.float32), axis=-1))


def l1(z: Float[Array, "batch d_sae"], decoder: Float[Array, "d_sae d_out"]) -> Float[Array, ""]:
    """mean_b Σ_j z_bj ‖decoder_j‖, which scaling a latent against its decoder cannot lower (Conerly et al. 2024)."""
    return jnp.mean(jnp.einsum("bs,s->b", z, jnp.linalg.norm(decoder, axis=-1)))


def auxk(
    residual: Float[Array, "batch d_out"],
    pre: Float[Array, "batch dead"],
    is_dead: Bool[Array, " dead"],
    decoder: Float[Array, "dead d_out"],
    k_aux: int,
) -> Float[Array, ""]:
    """min(1, n_dead/k_aux) · mean_b ‖e − ê‖², ê from the k_aux largest dead latents, e detached (Gao et al. 2024, A.2).

    `pre` and `decoder` are of candidates, of which those with `is_dead` count; 0, and a zero gradient, if none does.
    """
    residual = jax.lax.stop_gradient(residual)
    masked = jnp.where(is_dead[None], pre, -jnp.inf)
    kth = kth_largest(jax.lax.stop_gradient(masked), k_aux)
    z = jnp.where(is_dead[None] & (masked >= kth), jax.nn.relu(pre), 0.0)
    share = jnp.minimum(1.0, jnp.sum(is_dead.astype(jnp.float32)) / k_aux)
    return share * squared_error(residual, jnp.einsum("bs,sd->bd", z, decoder))
