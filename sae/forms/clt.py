"""Cross-layer transcoder: latents that read one layer and write the MLP outputs of that layer and of all later ones."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sae.codes.products import pair_dots
from sae.codes.select import SparseCode, top_k
from sae.errors import InputError
from sae.forms import ksparse, losses
from sae.forms.abstract import Shape, add_bias, initial, row_lengths, written
from sae.forms.ksparse import AbstractBatchTopK, check_k
from sae.forms.objective import Hyper, Objective, Selection, Taken, count_fired, flat, product


class CLT(AbstractBatchTopK):
    """ŷ_l = Σ_{i ≤ l} z_j decoder_jl + b_dec_l, i the layer that latent j reads: π_j = encoder_j · x_i + b_enc_j.

    z = π · 1[π > threshold]: cross-layer transcoders (Ameisen et al. 2025, Attribution graphs: methods) with BatchTopK's
    rule over all layers: a batch keeps the batch·k largest of z_j Σ_l ‖decoder_jl‖, in whatever layer they are, k a
    position in all. Layers are scaled one by one for training, so that all weigh the same; `fold` keeps z. Latents lie
    layer by layer, equally many of each; rows of layers before a latent's own count for nothing.
    """

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae sites d_model"]
    b_dec: Float[Array, "sites d_model"]
    threshold: Float[Array, ""]
    k: int = eqx.field(static=True)
    apply_b_dec_to_input: bool = eqx.field(static=True, default=False)
    name: ClassVar[str] = "clt"
    several_sites: ClassVar[bool] = True
    transcodes: ClassVar[bool] = True
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    active_per_k: ClassVar[int | None] = 4
    details: ClassVar = {"k": check_k}

    @classmethod
    def init(cls, *, sites: int, d_model: int, d_sae: int, k: int, key: PRNGKeyArray) -> "CLT":
        """`sites`: layers; `d_sae`: latents of all of them."""
        per_layer = _per_layer(d_sae, sites)
        read, write = jax.random.split(key)
        parts = initial(d_model, d_sae, None, read)
        rows = initial(sites * d_model, d_sae, None, write)["decoder"].reshape(d_sae, sites, d_model)
        rows = jnp.where(_reaches(per_layer, sites), rows, 0.0)
        return cls(
            encoder=parts["encoder"],
            b_enc=parts["b_enc"],
            decoder=rows / row_lengths(rows)[:, None, None],
            b_dec=jnp.zeros((sites, d_model), jnp.float32),
            threshold=ksparse.unknown_threshold(),
            k=check_k(k, d_sae),
        )

    @property
    def sites(self) -> int:
        return self.decoder.shape[-2]

    @property
    def d_model(self) -> int:
        return self.encoder.shape[-1]

    @property
    def per_layer(self) -> int:
        """Latents of one layer."""
        return self.d_sae // self.sites

    @classmethod
    def sizes(cls, w_enc: Shape, w_dec: Shape) -> dict[str, Any]:
        if len(w_enc) != 2 or len(w_dec) != 3 or 0 in w_enc + w_dec or w_dec[::2] != w_enc[::-1]:
            expected = "[d_model, d_sae] and [d_sae, layers, d_model]"
            raise InputError(f"W_enc, W_dec: found shapes {w_enc} and {w_dec}, expected {expected}")
        _per_layer(w_enc[1], w_dec[1])
        return {"sites": w_dec[1], "d_model": w_enc[0], "d_sae": w_enc[1]}

    def rows(self) -> Float[Array, "d_sae sites d_model"]:
        """The decoder, zero at the layers before a latent's own."""
        return jnp.where(_reaches(self.per_layer, self.sites), self.decoder, 0.0)

    def encode(self, x: Float[Array, "*batch sites d_model"]) -> Float[Array, "*batch d_sae"]:
        """The latents z(x) ≥ 0, float32 and dense, layer by layer; latent j fired where z_j > 0."""
        by_layer = self.encoder.reshape(self.sites, self.per_layer, self.d_model)
        dots = jnp.einsum("...ld,lfd->...lf", self.centre(x), by_layer)
        pre = add_bias(dots.reshape(*dots.shape[:-2], self.d_sae), self.b_enc)
        return ksparse.over_threshold(pre, self.threshold, self.k)

    def decode(
        self, z: Float[Array, "*batch d_sae"] | SparseCode | tuple[Array, Array]
    ) -> Float[Array, "*batch sites d_model"]:
        """ŷ of every layer, from dense latents or from (indices, values)."""
        out = written(z, flat(self.rows()))
        return add_bias(out.reshape(*out.shape[:-1], *self.writes), self.b_dec)

    def fold(
        self,
        scale: Float[Array, " sites"],
        mean: Float[Array, "sites d_model"],
        scale_out: Float[Array, " sites"] | None = None,
        mean_out: Float[Array, "sites d_model"] | None = None,
    ) -> "CLT":
        """The module that does on raw x what this one does on scale·(x − mean); z stays as it is."""
        scale_out = scale if scale_out is None else scale_out
        mean_out = mean if mean_out is None else mean_out
        encoder = self.encoder * jnp.repeat(scale, self.per_layer)[:, None]
        new = (
            encoder,
            self.b_enc - jnp.sum(encoder * jnp.repeat(mean, self.per_layer, axis=0), axis=-1),
            self.rows() / scale_out[None, :, None],
            self.b_dec / scale_out[:, None] + mean_out,
        )
        return eqx.tree_at(lambda m: (m.encoder, m.b_enc, m.decoder, m.b_dec), self, new)

    def loss(
        self, x: Float[Array, "batch sites d_model"], y: Float[Array, "batch sites d_model"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_b Σ_l ‖y_l − ŷ_l‖² from the batch·k largest of all layers."""
        z = ksparse.batch_code(self._products(x, dtype), hyper)
        y_hat = product(z, flat(self.rows()).T, dtype) + self.b_dec.reshape(1, -1)
        return Objective.of(losses.squared_error(flat(y), y_hat), flat(y), y_hat, count_fired(z), z)

    def select(self, x: Float[Array, "batch sites d_model"], hyper: Hyper, dtype: Any, candidates: int) -> Selection:
        code = top_k(self._products(x, dtype), candidates)
        return ksparse.kept_pairs(code, self.d_sae, (self.k, hyper.k))

    def sparse_loss(
        self, x: Float[Array, "batch sites d_model"], y: Float[Array, "batch sites d_model"], chosen: Selection
    ) -> Objective:
        # every layer of a sample is a row of its own to the latents that read it
        read = chosen.rows * self.sites + chosen.columns // self.per_layer
        centred = lax.stop_gradient(self.centre(x)).reshape(-1, self.d_model)
        dots = pair_dots(read, chosen.columns, centred, self.encoder)
        values = jnp.where(chosen.kept, jax.nn.relu(dots + self.b_enc[chosen.columns]), 0.0)
        (part,) = ksparse.pair_parts((self.d_sae,), chosen, values, flat(self.rows()), x.shape[0])
        y_hat = part + self.b_dec.reshape(1, -1)
        fired = ksparse.fired_pairs(chosen.columns, values, self.d_sae)
        return Objective.of(losses.squared_error(flat(y), y_hat), flat(y), y_hat, fired, values)

    def offered(
        self, x: Float[Array, "batch sites d_model"], latents: Int[Array, " some"]
    ) -> tuple[Float[Array, "batch some"], Float[Array, "some width"]]:
        own = self.centre(x)[:, latents // self.per_layer]
        pre = jnp.einsum("bsd,sd->bs", own, self.encoder[latents]) + self.b_enc[latents][None]
        return pre, flat(self.rows()[latents])

    def settled(self, objective: Objective, taken: Taken) -> "CLT":
        threshold = ksparse.running_threshold(self.threshold, objective, taken)
        return eqx.tree_at(lambda m: m.threshold, self, threshold)

    def _products(self, x: Float[Array, "batch sites d_model"], dtype: Any) -> Float[Array, "batch d_sae"]:
        """π, one product a layer."""
        rows, size = self.centre(x), self.per_layer
        parts = [product(rows[:, at], self.encoder[at * size : (at + 1) * size], dtype) for at in range(self.sites)]
        return jnp.concatenate(parts, axis=-1) + self.b_enc[None]


def _per_layer(d_sae: int, sites: int) -> int:
    if sites < 1 or d_sae % sites:
        raise InputError(
            f"d_sae: found {d_sae}, expected a multiple of the {sites} layers: equally many latents of each"
        )
    return d_sae // sites


def _reaches(per_layer: int, sites: int) -> Array:
    """Where [d_sae, sites, 1] a latent's layer is not after the one that is written."""
    own = jnp.repeat(jnp.arange(sites), per_layer)
    return (own[:, None] <= jnp.arange(sites)[None])[:, :, None]
