"""Skip transcoder: a linear map of what is read beside the latents, so that they need only write what is not linear."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sae.forms import ksparse
from sae.forms.abstract import AbstractSAE, initial
from sae.forms.batchtopk import BatchTopK
from sae.forms.ksparse import AbstractBatchTopK, check_k
from sae.forms.objective import Hyper, Objective, Selection, Taken, product


class SkipTranscoder(AbstractSAE, AbstractBatchTopK):
    """ŷ = z · decoder + b_dec + x · skipᵀ with BatchTopK's z (Paulo et al. 2025, arXiv 2501.18823, §3).

    What the skip leaves of y is what a BatchTopK learns; both learn at once.
    """

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    threshold: Float[Array, ""]
    skip: Float[Array, "d_out d_model"]
    k: int = eqx.field(static=True)
    apply_b_dec_to_input: bool = eqx.field(static=True, default=False)
    name: ClassVar[str] = "skip"
    transcodes: ClassVar[bool] = True
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    active_per_k: ClassVar[int | None] = 4
    details: ClassVar = {"k": check_k}
    stored_names: ClassVar = {"skip": "W_skip"}

    @classmethod
    def init(cls, *, d_model: int, d_sae: int, k: int, key: PRNGKeyArray, d_out: int | None = None) -> "SkipTranscoder":
        """`d_out` is d_model unless it is said; the skip is zero at the start."""
        d_out = d_model if d_out is None else d_out
        parts = initial(d_model, d_sae, d_out, key)
        skip = jnp.zeros((d_out, d_model), jnp.float32)
        return cls(**parts, threshold=ksparse.unknown_threshold(), skip=skip, k=check_k(k, d_sae))

    def latents(self) -> BatchTopK:
        """The same without its skip."""
        names = ("encoder", "b_enc", "decoder", "b_dec", "threshold", "k", "apply_b_dec_to_input")
        return BatchTopK(**{name: getattr(self, name) for name in names})

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return ksparse.over_threshold(pre, self.threshold, self.k)

    def beside(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_out"]:
        return jnp.einsum("...d,od->...o", x.astype(jnp.float32), self.skip)

    def fold(
        self,
        scale: Float[Array, ""],
        mean: Float[Array, " d_model"],
        scale_out: Float[Array, ""] | None = None,
        mean_out: Float[Array, " d_out"] | None = None,
    ) -> "SkipTranscoder":
        """As every form, and skip · scale · (x − mean) / scale_out becomes a matrix of x and a part of b_dec."""
        folded = super().fold(scale, mean, scale_out, mean_out)
        skip = self.skip * (scale / (scale if scale_out is None else scale_out))
        return eqx.tree_at(lambda m: (m.skip, m.b_dec), folded, (skip, folded.b_dec - skip @ mean))

    def loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_b ‖y − ŷ‖² from the batch·k largest."""
        return self.latents().loss(x, y - product(x, self.skip, dtype), hyper, dtype)

    def select(self, x: Float[Array, "batch d_model"], hyper: Hyper, dtype: Any, candidates: int) -> Selection:
        return self.latents().select(x, hyper, dtype, candidates)

    def sparse_loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], chosen: Selection
    ) -> Objective:
        return self.latents().sparse_loss(x, y - self.beside(x), chosen)

    def settled(self, objective: Objective, taken: Taken) -> "SkipTranscoder":
        threshold = ksparse.running_threshold(self.threshold, objective, taken)
        return eqx.tree_at(lambda m: m.threshold, self, threshold)
