"""TopK: every sample keeps its k largest latents."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sae.codes.products import choose, row_dots, weighted_rows
from sae.codes.select import SparseCode, to_dense
from sae.errors import InputError
from sae.forms import losses
from sae.forms.abstract import AbstractSAE, initial
from sae.forms.ksparse import AbstractKSparse, check_k, fired_pairs, sparse_bias
from sae.forms.objective import Hyper, Objective, Selection, Taken, count_fired, product


class TopK(AbstractSAE, AbstractKSparse):
    """z = ReLU(TopK_k(π)), π = encoder · (x − b_dec) + b_enc (Gao et al. 2024, §2.3); ties go to the lower index."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    k: int = eqx.field(static=True)
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    name: ClassVar[str] = "topk"
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    free_norm: ClassVar[bool] = True
    exactly_k: ClassVar[bool] = True
    active_per_k: ClassVar[int | None] = 1
    details: ClassVar = {"k": check_k}
    short_start: ClassVar = {"encoder_norm": 0.3}  # shorter rows leave far more latents dead there (docs/LOG.md)

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        d_sae: int,
        k: int,
        key: PRNGKeyArray,
        d_out: int | None = None,
        encoder_norm: float = 0.01,
    ) -> "TopK":
        """`encoder_norm`: of its rows at the start; short ones find more features in thousands of steps, long ones (0.3)
        leave fewer latents dead in hundreds (docs/LOG.md)."""
        if not 0 < encoder_norm < float("inf"):
            raise InputError(f"encoder_norm: found {encoder_norm}, expected a finite number above 0")
        return cls(**initial(d_model, d_sae, d_out, key, encoder_norm), k=check_k(k, d_sae))

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        values, indices = lax.top_k(pre, self.k)
        return to_dense(SparseCode(indices, jax.nn.relu(values)), self.d_sae)

    def loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_b ‖y − ŷ‖²."""
        values, indices = lax.top_k(product(self.centre(x), self.encoder, dtype) + self.b_enc[None], self.k)
        values = jnp.where(jnp.arange(self.k, dtype=jnp.float32)[None] < hyper.k, jax.nn.relu(values), 0.0)
        z = to_dense(SparseCode(indices, values), self.d_sae)
        y_hat = product(z, self.decoder.T, dtype) + self.b_dec[None]
        return Objective.of(losses.squared_error(y, y_hat), y, y_hat, count_fired(z), z)

    def sparse_pays(self) -> bool:
        return True

    def select(self, x: Float[Array, "batch d_model"], hyper: Hyper, dtype: Any, candidates: int) -> Selection:
        indices, _ = choose(self.centre(x).astype(dtype), self.encoder.astype(dtype), self.b_enc, candidates)
        kept = jnp.broadcast_to(jnp.arange(candidates, dtype=jnp.float32)[None] < hyper.k, indices.shape)
        rows = jnp.repeat(jnp.arange(x.shape[0], dtype=jnp.int32), candidates)
        return Selection(rows, indices.reshape(-1), kept.reshape(-1), jnp.array(False))

    def sparse_loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], chosen: Selection
    ) -> Objective:
        indices = chosen.columns.reshape(x.shape[0], -1)
        dots = row_dots(indices, lax.stop_gradient(self.centre(x)), self.encoder).reshape(-1)
        values = jnp.where(chosen.kept, jax.nn.relu(dots + sparse_bias(self)[chosen.columns]), 0.0)
        y_hat = weighted_rows(indices, values.reshape(indices.shape), self.decoder) + self.b_dec[None]
        fired = fired_pairs(chosen.columns, values, self.d_sae)
        return Objective.of(losses.squared_error(y, y_hat), y, y_hat, fired, values)

    def settled(self, objective: Objective, taken: Taken) -> "TopK":
        return self
