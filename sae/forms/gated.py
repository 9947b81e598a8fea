"""Gated: one path says which latents fire, another how strongly."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sae.forms import losses
from sae.forms.abstract import AbstractSAE, initial
from sae.forms.objective import Hyper, Objective, Taken, count_fired, product


class Gated(AbstractSAE):
    """z = 1[π > 0] · ReLU(exp(r_mag) · (π − b_enc) + b_mag), b_enc the gate's (Rajamanoharan et al. 2024a, §3.2)."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    b_mag: Float[Array, " d_sae"]
    r_mag: Float[Array, " d_sae"]
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    name: ClassVar[str] = "gated"
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "b_mag")
    biases: ClassVar = {"b_enc": None, "b_mag": "r_mag"}
    sparsity: ClassVar[float] = 0.05
    stored_names: ClassVar = {"b_enc": "b_gate"}

    @classmethod
    def init(cls, *, d_model: int, d_sae: int, key: PRNGKeyArray, d_out: int | None = None) -> "Gated":
        zeros = jnp.zeros((d_sae,), jnp.float32)
        return cls(**initial(d_model, d_sae, d_out, key), b_mag=zeros, r_mag=zeros)

    @property
    def b_gate(self) -> Float[Array, " d_sae"]:
        """SAELens' name of the gate's bias."""
        return self.b_enc

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        over = range(pre.ndim - 1)
        dots = pre - jnp.expand_dims(self.b_enc, over)
        scale, bias = jnp.expand_dims(jnp.exp(self.r_mag), over), jnp.expand_dims(self.b_mag, over)
        return jnp.where(pre > 0, jax.nn.relu(dots * scale + bias), 0.0)

    def loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_b ‖y − ŷ‖² + sparsity · L1 of the gate + the gate's own reconstruction (same paper, eq. 8)."""
        pre = product(self.centre(x), self.encoder, dtype) + self.b_enc[None]
        z = self.activate(pre)
        penalty = hyper.sparsity * losses.l1(jax.nn.relu(pre), lax.stop_gradient(self.decoder))
        penalty = penalty + gate_auxiliary(y, pre, self.decoder, self.b_dec)
        y_hat = product(z, self.decoder.T, dtype) + self.b_dec[None]
        return Objective.of(losses.squared_error(y, y_hat) + penalty, y, y_hat, count_fired(z), z)

    def settled(self, objective: Objective, taken: Taken) -> "Gated":
        return self


def gate_auxiliary(
    x: Float[Array, "batch d_out"],
    gate: Float[Array, "batch d_sae"],
    decoder: Float[Array, "d_sae d_out"],
    b_dec: Float[Array, " d_out"],
) -> Float[Array, ""]:
    """mean_b ‖x − (ReLU(π) · decoder + b_dec)‖² with the decoder frozen (Rajamanoharan et al. 2024a, eq. 8)."""
    frozen, bias = lax.stop_gradient((decoder, b_dec))
    return losses.squared_error(x, jnp.einsum("bs,sd->bd", jax.nn.relu(gate), frozen) + bias[None])
