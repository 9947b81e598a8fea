"""BatchTopK: a batch keeps k latents a sample on average, and one threshold stands for that afterwards."""

from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from sae.forms import ksparse, losses
from sae.forms.abstract import AbstractSAE, initial
from sae.forms.ksparse import AbstractBatchTopK, check_k
from sae.forms.objective import Hyper, Objective, Selection, Taken, count_fired, product


class BatchTopK(AbstractSAE, AbstractBatchTopK):
    """z = π · 1[π > threshold], the threshold learned while training keeps the batch·k largest (Bussmann et al. 2024).

    threshold is the running mean of the smallest value kept; below 0 it is not yet known, and the batch·k largest of
    the batch at hand are kept, as in training.
    """

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    threshold: Float[Array, ""]
    k: int = eqx.field(static=True)
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    name: ClassVar[str] = "batchtopk"
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    active_per_k: ClassVar[int | None] = 4
    details: ClassVar = {"k": check_k}

    @classmethod
    def init(cls, *, d_model: int, d_sae: int, k: int, key: PRNGKeyArray, d_out: int | None = None) -> "BatchTopK":
        parts = initial(d_model, d_sae, d_out, key)
        return cls(**parts, threshold=ksparse.unknown_threshold(), k=check_k(k, d_sae))

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return ksparse.over_threshold(pre, self.threshold, self.k)

    def loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_b ‖y − ŷ‖² from the batch·k largest."""
        z = ksparse.batch_code(product(self.centre(x), self.encoder, dtype) + self.b_enc[None], hyper)
        y_hat = product(z, self.decoder.T, dtype) + self.b_dec[None]
        return Objective.of(losses.squared_error(y, y_hat), y, y_hat, count_fired(z), z)

    def select(self, x: Float[Array, "batch d_model"], hyper: Hyper, dtype: Any, candidates: int) -> Selection:
        encoder = self.encoder.astype(dtype)
        return ksparse.batch_select(self.centre(x).astype(dtype), encoder, self.b_enc, (self.k, hyper.k), candidates)

    def sparse_loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], chosen: Selection
    ) -> Objective:
        values = ksparse.pair_values(self, self.centre(x), self.encoder, chosen)
        (part,) = ksparse.pair_parts((self.d_sae,), chosen, values, self.decoder, x.shape[0])
        y_hat = part + self.b_dec[None]
        fired = ksparse.fired_pairs(chosen.columns, values, self.d_sae)
        return Objective.of(losses.squared_error(y, y_hat), y, y_hat, fired, values)

    def settled(self, objective: Objective, taken: Taken) -> "BatchTopK":
        threshold = ksparse.running_threshold(self.threshold, objective, taken)
        return eqx.tree_at(lambda m: m.threshold, self, threshold)
