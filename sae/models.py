"""Sparse autoencoders and transcoders: one abstract class, six final forms.

Conventions. Every latent owns one contiguous row: `encoder[j]` reads it, `decoder[j]` writes it, so that a sparse step
touches whole rows. SAELens' names are properties: `W_enc = encoder.T` `[d_model, d_sae]`, `W_dec = decoder`
`[d_sae, d_out]`; `b_enc`, `b_dec`, `threshold`, `apply_b_dec_to_input` mean what they mean there. A transcoder is a
form made with `d_out`: it reads one site, writes another, and does not subtract b_dec from its input. Parameters are
float32 whatever the activations are: a threshold stops moving in bf16.
"""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sae.errors import InputError
from sae.sparse import SparseCode, batch_top_k, to_dense, weighted_rows


class AbstractSAE(eqx.Module):
    """x̂ = Σ_j z_j(x) · decoder_j + b_dec, with z ≥ 0 sparse."""

    encoder: AbstractVar[Float[Array, "d_sae d_model"]]
    b_enc: AbstractVar[Float[Array, " d_sae"]]
    decoder: AbstractVar[Float[Array, "d_sae d_out"]]
    b_dec: AbstractVar[Float[Array, " d_out"]]
    apply_b_dec_to_input: AbstractVar[bool]
    in_latent_units: ClassVar[tuple[str, ...]]  # the fields that scale as z does
    unit_norm: ClassVar[bool]  # training keeps ‖decoder_j‖ = 1

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

    def preactivations(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """(x − b_dec) · encoderᵀ + b_enc in float32; x · encoderᵀ + b_enc without `apply_b_dec_to_input`."""
        x = x.astype(jnp.float32)  # activations arrive in the model's dtype, parameters are float32
        if self.apply_b_dec_to_input:
            x = _add(x, -self.b_dec)
        return _add(jnp.einsum("...d,sd->...s", x, self.encoder), self.b_enc)

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
            max_active = min(self.d_sae, k if isinstance(self, TopK) else 4 * k)
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
            return _add(weighted_rows(indices, values, self.decoder), self.b_dec)
        return _add(jnp.einsum("...s,sd->...d", z, self.decoder), self.b_dec)

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
            if isinstance(self, Gated):
                units[1] = units[1] - jnp.exp(self.r_mag) * jnp.einsum("sd,d->s", self.encoder, mean)
        new = [*units, self.decoder * (scale / scale_out), self.b_dec / scale_out + mean_out]
        names = (*self.in_latent_units, "decoder", "b_dec")
        return eqx.tree_at(lambda m: [getattr(m, name) for name in names], self, new)


class ReLU(AbstractSAE):
    """z = ReLU(π), π = encoder · (x − b_dec) + b_enc, trained with an L1 penalty (Bricken et al. 2023)."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    unit_norm: ClassVar[bool] = False  # the penalty weighs each latent by its decoder's norm instead

    @classmethod
    def init(cls, *, d_model: int, d_sae: int, key: PRNGKeyArray, d_out: int | None = None) -> "ReLU":
        return cls(**_initial(d_model, d_sae, d_out, key), apply_b_dec_to_input=d_out is None)

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return jax.nn.relu(pre)


class TopK(AbstractSAE):
    """z = ReLU(TopK_k(π)), π = encoder · (x − b_dec) + b_enc (Gao et al. 2024, §2.3); ties go to the lower index."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    k: int = eqx.field(static=True)
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    unit_norm: ClassVar[bool] = True

    @classmethod
    def init(cls, *, d_model: int, d_sae: int, k: int, key: PRNGKeyArray, d_out: int | None = None) -> "TopK":
        _check_k(k, d_sae)
        return cls(**_initial(d_model, d_sae, d_out, key), k=k, apply_b_dec_to_input=d_out is None)

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        values, indices = lax.top_k(pre, self.k)
        return to_dense(SparseCode(indices, jax.nn.relu(values)), self.d_sae)


class BatchTopK(AbstractSAE):
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
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    unit_norm: ClassVar[bool] = True

    @classmethod
    def init(cls, *, d_model: int, d_sae: int, k: int, key: PRNGKeyArray, d_out: int | None = None) -> "BatchTopK":
        _check_k(k, d_sae)
        return cls(
            **_initial(d_model, d_sae, d_out, key), threshold=_unknown(), k=k, apply_b_dec_to_input=d_out is None
        )

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return _threshold_or_batch(pre, self.threshold, self.k)


class Matryoshka(AbstractSAE):
    """BatchTopK whose first m latents alone reconstruct too, for every m in widths (Bussmann et al. 2025, §3)."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    threshold: Float[Array, ""]
    k: int = eqx.field(static=True)
    widths: tuple[int, ...] = eqx.field(static=True)
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    unit_norm: ClassVar[bool] = True

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        d_sae: int,
        k: int,
        key: PRNGKeyArray,
        widths: tuple[int, ...] | None = None,
        d_out: int | None = None,
    ) -> "Matryoshka":
        """`widths` rise to d_sae; by default d_sae over 16, 8, 4, 2 and 1."""
        _check_k(k, d_sae)
        if widths is None:
            widths = tuple(sorted({max(1, d_sae // part) for part in (16, 8, 4, 2, 1)}))
        if list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != d_sae:
            raise InputError(f"widths: found {widths}, expected rising positive sizes that end at d_sae={d_sae}")
        parts = _initial(d_model, d_sae, d_out, key)
        return cls(**parts, threshold=_unknown(), k=k, widths=tuple(widths), apply_b_dec_to_input=d_out is None)

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return _threshold_or_batch(pre, self.threshold, self.k)


class JumpReLU(AbstractSAE):
    """z = π · 1[π > threshold], threshold ≥ 0 per latent, learned straight through (Rajamanoharan et al. 2024b, §3)."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    threshold: Float[Array, " d_sae"]
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    unit_norm: ClassVar[bool] = True

    @classmethod
    def init(
        cls, *, d_model: int, d_sae: int, key: PRNGKeyArray, threshold: float = 0.01, d_out: int | None = None
    ) -> "JumpReLU":
        if not 0 <= threshold < float("inf"):
            raise InputError(f"threshold: found {threshold}, expected a finite number of at least 0")
        thresholds = jnp.full((d_sae,), threshold, jnp.float32)
        return cls(**_initial(d_model, d_sae, d_out, key), threshold=thresholds, apply_b_dec_to_input=d_out is None)

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return jnp.where(pre > jnp.expand_dims(self.threshold, range(pre.ndim - 1)), jax.nn.relu(pre), 0.0)


class Gated(AbstractSAE):
    """z = 1[π > 0] · ReLU(exp(r_mag) · (π − b_enc) + b_mag) with b_enc the gate's (Rajamanoharan et al. 2024a, §3.2)."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    b_mag: Float[Array, " d_sae"]
    r_mag: Float[Array, " d_sae"]
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "b_mag")
    unit_norm: ClassVar[bool] = True

    @classmethod
    def init(cls, *, d_model: int, d_sae: int, key: PRNGKeyArray, d_out: int | None = None) -> "Gated":
        zeros = jnp.zeros((d_sae,), jnp.float32)
        return cls(**_initial(d_model, d_sae, d_out, key), b_mag=zeros, r_mag=zeros, apply_b_dec_to_input=d_out is None)

    @property
    def b_gate(self) -> Float[Array, " d_sae"]:
        """SAELens' name of the gate's bias."""
        return self.b_enc

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        over = range(pre.ndim - 1)
        product = pre - jnp.expand_dims(self.b_enc, over)
        scale, bias = jnp.expand_dims(jnp.exp(self.r_mag), over), jnp.expand_dims(self.b_mag, over)
        return jnp.where(pre > 0, jax.nn.relu(product * scale + bias), 0.0)


FORMS: dict[str, type[AbstractSAE]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "matryoshka": Matryoshka,
}


def _add(x: Float[Array, "*batch width"], bias: Float[Array, " width"]) -> Float[Array, "*batch width"]:
    return x + jnp.expand_dims(bias, range(x.ndim - 1))


def _check_k(k: int, d_sae: int) -> None:
    if not 1 <= k <= d_sae:
        raise InputError(f"k: found {k}, expected between 1 and d_sae={d_sae}")


def _initial(d_model: int, d_sae: int, d_out: int | None, key: PRNGKeyArray) -> dict[str, Array]:
    """Unit decoder rows in random directions, the encoder their copy (Gao et al. 2024, Appendix A.1), zero biases."""
    for name, size in {"d_model": d_model, "d_sae": d_sae, "d_out": d_out}.items():
        if size is not None and size < 1:
            raise InputError(f"{name}: found {size}, expected at least 1")
    read, write = jax.random.split(key)
    encoder = _unit_rows(jax.random.normal(read, (d_sae, d_model), jnp.float32))
    decoder = encoder
    if d_out is not None:
        decoder = _unit_rows(jax.random.normal(write, (d_sae, d_out), jnp.float32))
    b_enc, b_dec = jnp.zeros(d_sae, jnp.float32), jnp.zeros(decoder.shape[-1], jnp.float32)
    return {"encoder": encoder, "b_enc": b_enc, "decoder": decoder, "b_dec": b_dec}


def _unknown() -> Float[Array, ""]:
    return jnp.array(-1.0, jnp.float32)


def _unit_rows(matrix: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
    return matrix / jnp.linalg.norm(matrix, axis=-1, keepdims=True)


def _threshold_or_batch(
    pre: Float[Array, "*batch d_sae"], threshold: Float[Array, ""], k: int
) -> Float[Array, "*batch d_sae"]:
    def known(pre):
        return jnp.where(pre > threshold, jax.nn.relu(pre), 0.0)

    def unknown(pre):
        return batch_top_k(pre.reshape(-1, pre.shape[-1]), k).reshape(pre.shape)

    return lax.cond(threshold >= 0, known, unknown, pre)
