"""What every form of sparse autoencoder is: two matrices with one row per latent, two biases, an activation."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sae.codes.sparse import SparseCode, weighted_rows
from sae.errors import InputError


class AbstractSAE(eqx.Module):
    """x̂ = Σ_j z_j(x) · decoder_j + b_dec, with z ≥ 0 sparse."""

    encoder: AbstractVar[Float[Array, "d_sae d_model"]]
    b_enc: AbstractVar[Float[Array, " d_sae"]]
    decoder: AbstractVar[Float[Array, "d_sae d_out"]]
    b_dec: AbstractVar[Float[Array, " d_out"]]
    apply_b_dec_to_input: AbstractVar[bool]
    in_latent_units: ClassVar[tuple[str, ...]]  # the fields that scale as z does
    unit_norm: ClassVar[bool]  # a trained module has ‖decoder_j‖ = 1
    free_norm: ClassVar[bool] = False  # while training, rows grow freely unless TrainConfig.free_norm says otherwise
    b2: ClassVar[float] = 0.999  # Adam's memory of squared gradients, unless TrainConfig.b2 says otherwise
    exactly_k: ClassVar[bool] = False  # no sample ever fires more than k latents

    @property
    def d_model(self) -> int:
        return self.encoder.shape[-1]

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[-2]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[-1]

    @property
    def W_enc(self) -> Float[Array, "d_model d_sae"]:
        """SAELens' encoder matrix."""
        return self.encoder.T

    @property
    def W_dec(self) -> Float[Array, "d_sae d_out"]:
        """SAELens' decoder matrix."""
        return self.decoder

    def centre(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        """What the encoder reads: x − b_dec in float32, or x without `apply_b_dec_to_input`."""
        x = x.astype(jnp.float32)  # activations arrive in the model's dtype, parameters are float32
        return add_bias(x, -self.b_dec) if self.apply_b_dec_to_input else x

    def preactivations(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """π = centre(x) · encoderᵀ + b_enc, float32."""
        return add_bias(jnp.einsum("...d,sd->...s", self.centre(x), self.encoder), self.b_enc)

    @abstractmethod
    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        """The latents z ≥ 0 that these pre-activations give."""

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """The latents z(x) ≥ 0, float32 and dense; latent j fired where z_j > 0."""
        return self.activate(self.preactivations(x))

    def encode_sparse(self, x: Float[Array, "*batch d_model"], max_active: int | None = None) -> SparseCode:
        """The latents as (indices, values), largest first; exact while no sample fires more than `max_active`.

        `max_active` defaults to k in TopK (always exact) and to 4·k in BatchTopK and Matryoshka; the others need it.
        """
        k = getattr(self, "k", None)
        if max_active is None and k is not None:
            max_active = min(self.d_sae, k if self.exactly_k else 4 * k)
        if max_active is None or not 1 <= max_active <= self.d_sae:
            raise InputError(f"max_active: found {max_active}, expected between 1 and d_sae={self.d_sae}")
        values, indices = lax.top_k(self.encode(x), max_active)
        return SparseCode(indices, values)

    def decode(
        self, z: Float[Array, "*batch d_sae"] | SparseCode | tuple[Array, Array]
    ) -> Float[Array, "*batch d_out"]:
        """x̂ = z · decoder + b_dec, from dense latents or from (indices, values)."""
        if isinstance(z, tuple):
            indices, values = z
            return add_bias(weighted_rows(indices, values, self.decoder), self.b_dec)
        return add_bias(jnp.einsum("...s,sd->...d", z, self.decoder), self.b_dec)

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_out"]:
        """x̂ = decode(encode(x)), float32."""
        return self.decode(self.encode(x))

    def fold(
        self,
        scale: Float[Array, ""],
        mean: Float[Array, " d_model"],
        scale_out: Float[Array, ""] | None = None,
        mean_out: Float[Array, " d_out"] | None = None,
    ) -> "AbstractSAE":
        """The module that does on raw x what this one does on scale·(x − mean), its latents in units of x: z/scale.

        A transcoder's target was scale_out·(y − mean_out); an autoencoder's is its input.
        """
        scale_out = scale if scale_out is None else scale_out
        mean_out = mean if mean_out is None else mean_out
        units = [getattr(self, name) / scale for name in self.in_latent_units]
        if not self.apply_b_dec_to_input:  # otherwise b_dec carries the mean into the encoder
            units[0] = units[0] - jnp.einsum("sd,d->s", self.encoder, mean)
            if (r_mag := getattr(self, "r_mag", None)) is not None:
                units[1] = units[1] - jnp.exp(r_mag) * jnp.einsum("sd,d->s", self.encoder, mean)
        new = [*units, self.decoder * (scale / scale_out), self.b_dec / scale_out + mean_out]
        names = (*self.in_latent_units, "decoder", "b_dec")
        return eqx.tree_at(lambda m: [getattr(m, name) for name in names], self, new)

    def lengthened(self, by: Float[Array, " d_sae"]) -> "AbstractSAE":
        """z_j times by_j > 0 and decoder_j over it: the same x̂, if the same latents fire."""
        names = [name for name in self.in_latent_units if getattr(self, name).ndim == self.b_enc.ndim]
        new = [self.encoder * by[:, None], self.decoder / by[:, None], *(getattr(self, name) * by for name in names)]
        return eqx.tree_at(lambda m: [getattr(m, name) for name in ("encoder", "decoder", *names)], self, new)

    def unit_rows(self) -> "AbstractSAE":
        """‖decoder_j‖ = 1, so that z_j is the length of what latent j writes."""
        return self.lengthened(_lengths(self.decoder))

    def balanced(self) -> "AbstractSAE":
        """‖encoder_j‖ = ‖decoder_j‖, their product kept."""
        return self.lengthened(jnp.sqrt(_lengths(self.decoder) / _lengths(self.encoder)))


def add_bias(x: Float[Array, "*batch width"], bias: Float[Array, " width"]) -> Float[Array, "*batch width"]:
    return x + jnp.expand_dims(bias, range(x.ndim - 1))


def check_k(k: int, d_sae: int) -> None:
    if not 1 <= k <= d_sae:
        raise InputError(f"k: found {k}, expected between 1 and d_sae={d_sae}")


def initial(
    d_model: int, d_sae: int, d_out: int | None, key: PRNGKeyArray, encoder_norm: float = 1.0
) -> dict[str, Array]:
    """Unit decoder rows in random directions, the encoder their copy (Gao et al. 2024, Appendix A.1), zero biases.

    Where every sample chooses its latents alone, a short encoder forgets the random start sooner; where the batch
    chooses, it lets the latents that grow first starve the others (measured on SynthSAEBench, docs/LOG.md).
    """
    for name, size in {"d_model": d_model, "d_sae": d_sae, "d_out": d_out}.items():
        if size is not None and size < 1:
            raise InputError(f"{name}: found {size}, expected at least 1")
    read, write = jax.random.split(key)
    encoder = _unit_rows(jax.random.normal(read, (d_sae, d_model), jnp.float32))
    decoder = encoder
    if d_out is not None:
        decoder = _unit_rows(jax.random.normal(write, (d_sae, d_out), jnp.float32))
    b_enc, b_dec = jnp.zeros(d_sae, jnp.float32), jnp.zeros(decoder.shape[-1], jnp.float32)
    return {"encoder": encoder_norm * encoder, "b_enc": b_enc, "decoder": decoder, "b_dec": b_dec}


def unknown_threshold() -> Float[Array, ""]:
    return jnp.array(-1.0, jnp.float32)


def _lengths(matrix: Float[Array, "rows width"]) -> Float[Array, " rows"]:
    square = jnp.sum(jnp.square(matrix), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 1.0)  # a row of zeros has no direction


def _unit_rows(matrix: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
    return matrix / jnp.linalg.norm(matrix, axis=-1, keepdims=True)
