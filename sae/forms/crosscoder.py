"""Crosscoder: one code for several sites, each read and written by rows of its own."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sae.codes.select import SparseCode
from sae.errors import InputError
from sae.forms import ksparse, losses
from sae.forms.abstract import Shape, add_bias, initial, row_lengths, written
from sae.forms.ksparse import AbstractBatchTopK, check_k
from sae.forms.objective import Hyper, Objective, Selection, Taken, count_fired, flat, product


class Crosscoder(AbstractBatchTopK):
    """π = Σ_s encoder_s · x_s + b_enc, z = π · 1[π > threshold], x̂_s = z · decoder_s + b_dec_s for every site s.

    Crosscoders (Lindsey et al. 2024) with BatchTopK's rule (Minder et al. 2025, arXiv 2504.02922): a batch keeps the
    batch·k largest of z_j Σ_s ‖decoder_js‖. A length of 1 means Σ_s ‖decoder_js‖ = 1 of activations as they were
    centred and scaled for training, where every site weighs the same; `fold` keeps z, whatever the sites' units are.
    """

    encoder: Float[Array, "d_sae sites d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae sites d_model"]
    b_dec: Float[Array, "sites d_model"]
    threshold: Float[Array, ""]
    k: int = eqx.field(static=True)
    apply_b_dec_to_input: bool = eqx.field(static=True, default=False)
    name: ClassVar[str] = "crosscoder"
    several_sites: ClassVar[bool] = True
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    free_norm: ClassVar[bool] = True
    active_per_k: ClassVar[int | None] = 4
    details: ClassVar = {"k": check_k}

    @classmethod
    def init(cls, *, sites: int, d_model: int, d_sae: int, k: int, key: PRNGKeyArray) -> "Crosscoder":
        if sites < 1:
            raise InputError(f"sites: found {sites}, expected at least 1")
        parts = initial(sites * d_model, d_sae, None, key)
        rows = parts["encoder"].reshape(d_sae, sites, d_model)
        length = row_lengths(rows)[:, None, None]
        return cls(
            encoder=rows * length,  # of a row of length 1 that is read and written by the same directions
            b_enc=parts["b_enc"],
            decoder=rows / length,
            b_dec=parts["b_dec"].reshape(sites, d_model),
            threshold=ksparse.unknown_threshold(),
            k=check_k(k, d_sae),
        )

    @property
    def sites(self) -> int:
        return self.encoder.shape[-2]

    @property
    def d_model(self) -> int:
        return self.encoder.shape[-1]

    @classmethod
    def sizes(cls, w_enc: Shape, w_dec: Shape) -> dict[str, Any]:
        if len(w_enc) != 3 or 0 in w_enc or w_dec != (w_enc[2], *w_enc[:2]):
            expected = "[sites, d_model, d_sae] and [d_sae, sites, d_model]"
            raise InputError(f"W_enc, W_dec: found shapes {w_enc} and {w_dec}, expected {expected}")
        return {"sites": w_enc[0], "d_model": w_enc[1], "d_sae": w_enc[2]}

    def encode(self, x: Float[Array, "*batch sites d_model"]) -> Float[Array, "*batch d_sae"]:
        """The latents z(x) ≥ 0, float32 and dense; latent j fired where z_j > 0."""
        pre = add_bias(jnp.einsum("...id,sid->...s", self.centre(x), self.encoder), self.b_enc)
        return ksparse.over_threshold(pre, self.threshold, self.k)

    def decode(
        self, z: Float[Array, "*batch d_sae"] | SparseCode | tuple[Array, Array]
    ) -> Float[Array, "*batch sites d_model"]:
        """x̂ of every site, from dense latents or from (indices, values)."""
        rows = written(z, flat(self.decoder))
        return add_bias(rows.reshape(*rows.shape[:-1], *self.writes), self.b_dec)

    def site_shares(self) -> Float[Array, "d_sae sites"]:
        """‖decoder_js‖ / Σ_s ‖decoder_js‖: near 1 at one site is a latent of that site, near 1/sites one they share."""
        norms = jnp.linalg.norm(self.decoder, axis=-1)
        total = jnp.sum(norms, axis=-1, keepdims=True)
        return norms / jnp.where(total > 0, total, 1.0)

    def fold(
        self,
        scale: Float[Array, " sites"],
        mean: Float[Array, "sites d_model"],
        scale_out: Float[Array, " sites"] | None = None,
        mean_out: Float[Array, "sites d_model"] | None = None,
    ) -> "Crosscoder":
        """The module that does on raw x what this one does on scale·(x − mean); z stays as it is."""
        scale_out = scale if scale_out is None else scale_out
        mean_out = mean if mean_out is None else mean_out
        encoder = self.encoder * scale[None, :, None]
        new = (
            encoder,
            self.b_enc - jnp.einsum("sid,id->s", encoder, mean),
            self.decoder / scale_out[None, :, None],
            self.b_dec / scale_out[:, None] + mean_out,
        )
        return eqx.tree_at(lambda m: (m.encoder, m.b_enc, m.decoder, m.b_dec), self, new)

    def loss(
        self, x: Float[Array, "batch sites d_model"], y: Float[Array, "batch sites d_model"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_b Σ_s ‖y_s − ŷ_s‖² from the batch·k largest."""
        pre = product(flat(self.centre(x)), flat(self.encoder), dtype) + self.b_enc[None]
        z = ksparse.batch_code(pre, hyper)
        y_hat = product(z, flat(self.decoder).T, dtype) + self.b_dec.reshape(1, -1)
        return Objective.of(losses.squared_error(flat(y), y_hat), flat(y), y_hat, count_fired(z), z)

    def select(self, x: Float[Array, "batch sites d_model"], hyper: Hyper, dtype: Any, candidates: int) -> Selection:
        centred, encoder = flat(self.centre(x)).astype(dtype), flat(self.encoder).astype(dtype)
        return ksparse.batch_select(centred, encoder, self.b_enc, (self.k, hyper.k), candidates)

    def sparse_loss(
        self, x: Float[Array, "batch sites d_model"], y: Float[Array, "batch sites d_model"], chosen: Selection
    ) -> Objective:
        values = ksparse.pair_values(self, flat(self.centre(x)), flat(self.encoder), chosen)
        (part,) = ksparse.pair_parts((self.d_sae,), chosen, values, flat(self.decoder), x.shape[0])
        y_hat = part + self.b_dec.reshape(1, -1)
        fired = ksparse.fired_pairs(chosen.columns, values, self.d_sae)
        return Objective.of(losses.squared_error(flat(y), y_hat), flat(y), y_hat, fired, values)

    def settled(self, objective: Objective, taken: Taken) -> "Crosscoder":
        threshold = ksparse.running_threshold(self.threshold, objective, taken)
        return eqx.tree_at(lambda m: m.threshold, self, threshold)
