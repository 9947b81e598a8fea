"""Losses as pure functions: each with its formula, its source, and a test against a plain NumPy statement of it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
    return jnp.mean(jnp.einsum("bs,s->b", z, _row_norms(decoder)))


def target_l0(found: Float[Array, " batch"], target: Float[Array, ""]) -> Float[Array, ""]:
    """mean_b (L0_b / target − 1)² (Rajamanoharan et al. 2024b, Appendix on a target sparsity)."""
    return jnp.mean(jnp.square(found / target - 1.0))


@jax.custom_vjp
def heaviside(
    pre: Float[Array, "batch d_sae"], threshold: Float[Array, " d_sae"], bandwidth: Float[Array, ""]
) -> Float[Array, "batch d_sae"]:
    """H(π − θ), whose pseudo-derivative is −K((π − θ)/ε)/ε in θ and 0 in π, K = 1 on (−½, ½) (same paper, eq. 12)."""
    return (pre > threshold[None]).astype(pre.dtype)


def _heaviside_forward(pre, threshold, bandwidth):
    return heaviside(pre, threshold, bandwidth), (pre, threshold, bandwidth)


def _heaviside_backward(residuals, out_bar):
    pre, threshold, bandwidth = residuals
    threshold_bar = -jnp.sum(_kernel(pre, threshold, bandwidth) * out_bar, axis=0) / bandwidth
    return jnp.zeros_like(pre), threshold_bar, jnp.zeros_like(bandwidth)


heaviside.defvjp(_heaviside_forward, _heaviside_backward)


@jax.custom_vjp
def jump_relu(
    pre: Float[Array, "batch d_sae"], threshold: Float[Array, " d_sae"], bandwidth: Float[Array, ""]
) -> Float[Array, "batch d_sae"]:
    """π · H(π − θ), whose pseudo-derivative is −(θ/ε) K((π − θ)/ε) in θ and H(π − θ) in π (same paper, eq. 11)."""
    return jnp.where(pre > threshold[None], jax.nn.relu(pre), 0.0)


def _jump_relu_forward(pre, threshold, bandwidth):
    return jump_relu(pre, threshold, bandwidth), (pre, threshold, bandwidth)


def _jump_relu_backward(residuals, out_bar):
    pre, threshold, bandwidth = residuals
    threshold_bar = -jnp.sum(_kernel(pre, threshold, bandwidth) * out_bar, axis=0) * threshold / bandwidth
    fired = (pre > threshold[None]) & (pre > 0)
    return jnp.where(fired, out_bar, 0.0), threshold_bar, jnp.zeros_like(bandwidth)


jump_relu.defvjp(_jump_relu_forward, _jump_relu_backward)


def gate_auxiliary(
    x: Float[Array, "batch d_out"],
    gate: Float[Array, "batch d_sae"],
    decoder: Float[Array, "d_sae d_out"],
    b_dec: Float[Array, " d_out"],
) -> Float[Array, ""]:
    """mean_b ‖x − (ReLU(π) · decoder + b_dec)‖² with the decoder frozen (Rajamanoharan et al. 2024a, eq. 8)."""
    frozen, bias = jax.lax.stop_gradient((decoder, b_dec))
    return squared_error(x, jnp.einsum("bs,sd->bd", jax.nn.relu(gate), frozen) + bias[None])


def prefixes(
    x: Float[Array, "batch d_out"], parts: Sequence[Float[Array, "batch d_out"]], b_dec: Float[Array, " d_out"]
) -> tuple[Float[Array, ""], Float[Array, "batch d_out"]]:
    """mean_m mean_b ‖x − x̂_m‖² with x̂_m = b_dec + Σ_{i≤m} parts_i, and the last x̂ (Bussmann et al. 2025, §3).

    parts_i is what the latents between the (i−1)th width and the ith write.
    """
    x_hat, loss = jnp.broadcast_to(b_dec[None], x.shape), jnp.float32(0)
    for part in parts:
        x_hat = x_hat + part
        loss = loss + squared_error(x, x_hat)
    return loss / len(parts), x_hat


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
    largest, _ = jax.lax.top_k(jax.lax.stop_gradient(masked), min(k_aux, masked.shape[-1]))
    kth = jnp.min(largest, axis=-1, keepdims=True)  # not the last column: slicing it out makes XLA sort whole rows
    z = jnp.where(is_dead[None] & (masked >= kth), jax.nn.relu(pre), 0.0)
    share = jnp.minimum(1.0, jnp.sum(is_dead.astype(jnp.float32)) / k_aux)
    return share * squared_error(residual, jnp.einsum("bs,sd->bd", z, decoder))


def _kernel(pre: Array, threshold: Array, bandwidth: Array) -> Array:
    return (jnp.abs(pre - threshold[None]) < bandwidth / 2).astype(pre.dtype)


def _row_norms(matrix: Float[Array, "rows width"]) -> Float[Array, " rows"]:
    return jnp.linalg.norm(matrix, axis=-1)
