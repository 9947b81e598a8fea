"""Sparse autoencoders and transcoders: one abstract class, six final forms.

Conventions. Every latent owns one contiguous row: `encoder[j]` reads it, `decoder[j]` writes it, so that a sparse step
touches whole rows. SAELens' names are properties: `W_enc = encoder.T` `[d_model, d_sae]`, `W_dec = decoder`
`[d_sae, d_out]`; `b_enc`, `b_dec`, `threshold`, `apply_b_dec_to_input` mean what they mean there. A transcoder is a
form made with `d_out`: it reads one site, writes another, and does not subtract b_dec from its input. Parameters are
float32 whatever the activations are: a threshold stops moving in bf16.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sae.codes.sparse import SparseCode, batch_top_k, to_dense
from sae.errors import InputError
from sae.forms.abstract import AbstractSAE, check_k, initial, unknown_threshold


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
        return cls(**initial(d_model, d_sae, d_out, key), apply_b_dec_to_input=d_out is None)

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
    free_norm: ClassVar[bool] = True
    exactly_k: ClassVar[bool] = True

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
        check_k(k, d_sae)
        if not 0 < encoder_norm < float("inf"):
            raise InputError(f"encoder_norm: found {encoder_norm}, expected a finite number above 0")
        return cls(**initial(d_model, d_sae, d_out, key, encoder_norm), k=k, apply_b_dec_to_input=d_out is None)

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
        check_k(k, d_sae)
        return cls(
            **initial(d_model, d_sae, d_out, key),
            threshold=unknown_threshold(),
            k=k,
            apply_b_dec_to_input=d_out is None,
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
        check_k(k, d_sae)
        if widths is None:
            widths = tuple(sorted({max(1, d_sae // part) for part in (16, 8, 4, 2, 1)}))
        if list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != d_sae:
            raise InputError(f"widths: found {widths}, expected rising positive sizes that end at d_sae={d_sae}")
        parts = initial(d_model, d_sae, d_out, key)
        return cls(
            **parts, threshold=unknown_threshold(), k=k, widths=tuple(widths), apply_b_dec_to_input=d_out is None
        )

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
    free_norm: ClassVar[bool] = True
    b2: ClassVar[float] = 0.99  # thresholds: their gradients shrink a hundredfold as latents fall silent

    @classmethod
    def init(
        cls, *, d_model: int, d_sae: int, key: PRNGKeyArray, threshold: float | None = None, d_out: int | None = None
    ) -> "JumpReLU":
        """`threshold`: of every latent; by default half a standard deviation of π on random inputs of length 1."""
        parts = initial(d_model, d_sae, d_out, key, 0.01)
        start = 0.005 / d_model**0.5 if threshold is None else threshold
        if not 0 <= start < float("inf"):
            raise InputError(f"threshold: found {threshold}, expected a finite number of at least 0")
        thresholds = jnp.full((d_sae,), start, jnp.float32)
        return cls(**parts, threshold=thresholds, apply_b_dec_to_input=d_out is None)

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return jnp.where(pre > jnp.expand_dims(self.threshold, range(pre.ndim - 1)), jax.nn.relu(pre), 0.0)


class Gated(AbstractSAE):
    """z = 1[π > 0] · ReLU(exp(r_mag) · (π − b_enc) + b_mag), b_enc the gate's (Rajamanoharan et al. 2024a, §3.2)."""

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
        return cls(**initial(d_model, d_sae, d_out, key), b_mag=zeros, r_mag=zeros, apply_b_dec_to_input=d_out is None)

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


def _threshold_or_batch(
    pre: Float[Array, "*batch d_sae"], threshold: Float[Array, ""], k: int
) -> Float[Array, "*batch d_sae"]:
    def known(pre):
        return jnp.where(pre > threshold, jax.nn.relu(pre), 0.0)

    def unknown(pre):
        return batch_top_k(pre.reshape(-1, pre.shape[-1]), k).reshape(pre.shape)

    return lax.cond(threshold >= 0, known, unknown, pre)
