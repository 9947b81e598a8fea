"""ReLU: every positive pre-activation fires, held down by an L1 penalty."""

from typing import Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from sae.forms import losses
from sae.forms.abstract import AbstractSAE, initial
from sae.forms.objective import Hyper, Objective, Taken, count_fired, product


class ReLU(AbstractSAE):
    """z = ReLU(π), π = encoder · (x − b_dec) + b_enc, trained with an L1 penalty (Bricken et al. 2023)."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    name: ClassVar[str] = "relu"
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    unit_norm: ClassVar[bool] = False  # the penalty weighs each latent by its decoder's norm instead
    sparsity: ClassVar[float] = 0.05

    @classmethod
    def init(cls, *, d_model: int, d_sae: int, key: PRNGKeyArray, d_out: int | None = None) -> "ReLU":
        return cls(**initial(d_model, d_sae, d_out, key))

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return jax.nn.relu(pre)

    def loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_b ‖y − ŷ‖² + sparsity · L1."""
        z = self.activate(product(self.centre(x), self.encoder, dtype) + self.b_enc[None])
        y_hat = product(z, self.decoder.T, dtype) + self.b_dec[None]
        total = losses.squared_error(y, y_hat) + hyper.sparsity * losses.l1(z, self.decoder)
        return Objective.of(total, y, y_hat, count_fired(z), z)

    def settled(self, objective: Objective, taken: Taken) -> "ReLU":
        return self
