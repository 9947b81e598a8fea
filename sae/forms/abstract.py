"""The contract: what a form of dictionary keeps, minimizes, keeps true while it trains, and is described by on disk.

Conventions. Every latent owns one contiguous row: `encoder[j]` reads, `decoder[j]` writes, so that a sparse step touches
whole rows. SAELens' names are properties: `W_enc = encoder.T` `[d_model, d_sae]`, `W_dec = decoder` `[d_sae, d_out]`;
`b_enc`, `b_dec`, `threshold`, `apply_b_dec_to_input` mean what they mean there. Parameters are float32 whatever the
activations are: a threshold stops moving in bf16.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import AbstractVar
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sae import shown
from sae.codes.products import weighted_rows
from sae.codes.select import SparseCode
from sae.errors import InputError
from sae.forms.objective import Hyper, Objective, Taken

Shape = tuple[int, ...]


def full_rate(length: Float[Array, "..."]) -> Float[Array, "..."]:
    """Biases and thresholds move as fast as the matrices, however long the run."""
    return jnp.ones_like(length)


class AbstractDictionary(eqx.Module):
    """x̂ = Σ_j z_j(x) · decoder_j + b_dec, with z ≥ 0 sparse, on rows of any shape: of one site or of several."""

    encoder: AbstractVar[Float[Array, "d_sae ..."]]
    b_enc: AbstractVar[Float[Array, " d_sae"]]
    decoder: AbstractVar[Float[Array, "d_sae ..."]]
    b_dec: AbstractVar[Float[Array, "..."]]
    apply_b_dec_to_input: AbstractVar[bool]

    init: ClassVar[Callable[..., "AbstractDictionary"]]  # of sizes, `details`, and `key`: a fresh module
    name: ClassVar[str]  # of the form, in flags, tables and files
    in_latent_units: ClassVar[tuple[str, ...]]  # the fields that scale as z does
    active_per_k: ClassVar[int | None] = None  # latents of one sample that `encode_sparse` looks for, over k
    several_sites: ClassVar[bool] = False  # a row is `sites d_model`
    transcodes: ClassVar[bool] = False  # of use only where it writes other sites than it reads
    # how it trains, unless TrainConfig says otherwise
    unit_norm: ClassVar[bool] = True  # a trained module has rows of length 1
    free_norm: ClassVar[bool] = False  # while training, rows grow freely
    unit_in_loss: ClassVar[bool] = True  # and enter the loss as (‖d_j‖ e_j, d_j / ‖d_j‖)
    b2: ClassVar[float] = 0.999  # Adam's memory of squared gradients
    bias_rate: ClassVar[Callable[[Array], Array]] = staticmethod(
        full_rate
    )  # of steps · rate: what biases move by, over it
    targets_l0: ClassVar[bool] = False  # the k asked for is the target of a penalty, not a rule
    sparsity: ClassVar[float] = 1.0  # weight of the penalty that suits activations of length 1
    short_start: ClassVar[Mapping[str, Any]] = {}  # keywords of `init` for runs of hundreds of steps
    # how it is described on disk
    details: ClassVar[Mapping[str, Callable[[Any, int], Any]]] = {}  # what `init` needs beside sizes -> its check
    stored_names: ClassVar[Mapping[str, str]] = {}  # SAELens' names of fields that are called otherwise there

    def __repr__(self) -> str:
        shape = getattr(self.encoder, "shape", None)
        if shape is None:
            return f"{type(self).__name__}(no arrays)"  # a tree of anything may have this shape
        *members, d_sae = self.b_enc.shape
        *sites, d_out = self.decoder.shape[self.b_enc.ndim :]
        d_model = shape[-1]
        sizes = {"members": members, "sites": sites, "d_model": [d_model], "d_out": [d_out] * (d_out != d_model)}
        spelled = [f"{name}={sizes[name][0]}" for name in sizes if sizes[name]] + [f"d_sae={d_sae}"]
        spelled += [f"{name}={getattr(self, name)}" for name in self.details]
        return f"{type(self).__name__}({', '.join(spelled)}, {self.encoder.dtype})"

    def _repr_html_(self) -> str:
        arrays = [leaf for leaf in jax.tree.leaves(self) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
        sizes = [int(np.prod(leaf.shape, dtype=np.int64)) for leaf in arrays]
        facts: dict[str, Any] = {"is": repr(self), "parameters": f"{sum(sizes):,}"}
        facts["bytes"] = f"{sum(size * leaf.dtype.itemsize for size, leaf in zip(sizes, arrays, strict=True)):,}"
        return shown.as_html(
            type(self).__name__, facts | {name.name: getattr(self, name.name) for name in fields(self)}
        )

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[0]

    @property
    def reads(self) -> Shape:
        """The shape of one row of input: as many sites as are written."""
        return (*self.b_dec.shape[:-1], self.encoder.shape[-1])

    @property
    def writes(self) -> Shape:
        """The shape of one row of output."""
        return self.decoder.shape[1:]

    @property
    def W_enc(self) -> Float[Array, "..."]:
        """SAELens' encoder matrix, `d_sae` last."""
        return jnp.moveaxis(self.encoder, 0, -1)

    @property
    def W_dec(self) -> Float[Array, "..."]:
        """SAELens' decoder matrix, `d_sae` first."""
        return self.decoder

    @classmethod
    @abstractmethod
    def sizes(cls, w_enc: Shape, w_dec: Shape) -> dict[str, Any]:
        """The sizes that `init` takes, from the shapes of W_enc and W_dec; raises if no module of this form has them."""

    @abstractmethod
    def encode(self, x: Float[Array, "*rows"]) -> Float[Array, "*batch d_sae"]:
        """The latents z(x) ≥ 0, float32 and dense; latent j fired where z_j > 0."""

    @abstractmethod
    def decode(self, z: Float[Array, "*batch d_sae"] | SparseCode | tuple[Array, Array]) -> Float[Array, "*rows"]:
        """x̂ = z · decoder + b_dec, from dense latents or from (indices, values)."""

    @abstractmethod
    def loss(self, x: Float[Array, "batch ..."], y: Float[Array, "batch ..."], hyper: Hyper, dtype: Any) -> Objective:
        """What the form minimizes, with all latents in hand; operands of dense products are rounded to `dtype`."""

    @abstractmethod
    def settled(self, objective: Objective, taken: Taken) -> "AbstractDictionary":
        """After a step: what the form keeps true of its thresholds; the same module where the step was not good."""

    def at_l0(self, x: Float[Array, "*rows"], l0: float) -> "AbstractDictionary":
        """The module of which `l0` latents fire on these rows on average, in forms that target one; others as they are."""
        return self

    @abstractmethod
    def fold(
        self,
        scale: Float[Array, "..."],
        mean: Float[Array, "..."],
        scale_out: Float[Array, "..."] | None = None,
        mean_out: Float[Array, "..."] | None = None,
    ) -> "AbstractDictionary":
        """The module that does on raw x what this one does on scale·(x − mean), `reads[:-1]` scales and `reads` means.

        What it predicted was scale_out·(y − mean_out); by default the same as it read.
        """

    def __call__(self, x: Float[Array, "*rows"]) -> Float[Array, "..."]:
        """x̂ = decode(encode(x)) + beside(x), float32."""
        return self.complete(self.encode(x), x)

    def beside(self, x: Float[Array, "*rows"]) -> Float[Array, "..."] | float:
        """What is added to the latents' part straight from x: nothing, but in forms with a skip connection."""
        return 0.0

    def complete(self, z: Float[Array, "*batch d_sae"], x: Float[Array, "*rows"]) -> Float[Array, "..."]:
        """x̂ from latents of x, its own or others in their place."""
        return self.decode(z) + self.beside(x)

    def encode_sparse(self, x: Float[Array, "*rows"], max_active: int | None = None) -> SparseCode:
        """The latents as (indices, values), largest first; exact while no sample fires more than `max_active`.

        `max_active` defaults to k in TopK (always exact) and to 4·k where a batch keeps k on average; others need it.
        """
        if max_active is None and self.active_per_k is not None:
            max_active = min(self.d_sae, self.active_per_k * getattr(self, "k", 0))
        if max_active is None or not 1 <= max_active <= self.d_sae:
            raise InputError(f"max_active: found {max_active}, expected between 1 and d_sae={self.d_sae}")
        values, indices = lax.top_k(self.encode(x), max_active)
        return SparseCode(indices, values)

    def centre(self, x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
        """What the encoder reads: x − b_dec in float32, or x without `apply_b_dec_to_input`."""
        x = x.astype(jnp.float32)  # activations arrive in the model's dtype, parameters are float32
        return add_bias(x, -self.b_dec) if self.apply_b_dec_to_input else x

    def lengthened(self, by: Float[Array, " d_sae"]) -> "AbstractDictionary":
        """z_j times by_j > 0 and decoder_j over it: the same x̂, if the same latents fire."""
        names = [name for name in self.in_latent_units if getattr(self, name).ndim == self.b_enc.ndim]
        read, write = (jnp.expand_dims(by, range(1, each.ndim)) for each in (self.encoder, self.decoder))
        new = [self.encoder * read, self.decoder / write, *(getattr(self, name) * by for name in names)]
        return eqx.tree_at(lambda m: [getattr(m, name) for name in ("encoder", "decoder", *names)], self, new)

    def unit_rows(self) -> "AbstractDictionary":
        """‖decoder_j‖ = 1, so that z_j is the length of what latent j writes."""
        return self.lengthened(row_lengths(self.decoder))

    def balanced(self) -> "AbstractDictionary":
        """‖encoder_j‖ = ‖decoder_j‖, their product kept."""
        return self.lengthened(jnp.sqrt(row_lengths(self.decoder) / row_lengths(self.encoder)))


class AbstractSAE(AbstractDictionary):
    """A dictionary that reads one site and writes one: the same, or as a transcoder (made with `d_out`) a later one."""

    biases: ClassVar[Mapping[str, str | None]] = {
        "b_enc": None
    }  # added to encoder · x -> the field whose exp scales that

    @property
    def d_model(self) -> int:
        return self.encoder.shape[-1]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[-1]

    @classmethod
    def sizes(cls, w_enc: Shape, w_dec: Shape) -> dict[str, Any]:
        if len(w_enc) != 2 or len(w_dec) != 2 or 0 in w_enc + w_dec:
            raise InputError(f"W_enc, W_dec: found shapes {w_enc} and {w_dec}, expected two matrices")
        return {"d_model": w_enc[0], "d_sae": w_enc[1], "d_out": w_dec[1]}

    @abstractmethod
    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        """The latents z ≥ 0 that these pre-activations give."""

    def preactivations(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """π = centre(x) · encoderᵀ + b_enc, float32."""
        return add_bias(jnp.einsum("...d,sd->...s", self.centre(x), self.encoder), self.b_enc)

    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_sae"]:
        """The latents z(x) ≥ 0, float32 and dense; latent j fired where z_j > 0."""
        return self.activate(self.preactivations(x))

    def decode(
        self, z: Float[Array, "*batch d_sae"] | SparseCode | tuple[Array, Array]
    ) -> Float[Array, "*batch d_out"]:
        """x̂ = z · decoder + b_dec, from dense latents or from (indices, values)."""
        return add_bias(written(z, self.decoder), self.b_dec)

    def fold(
        self,
        scale: Float[Array, ""],
        mean: Float[Array, " d_model"],
        scale_out: Float[Array, ""] | None = None,
        mean_out: Float[Array, " d_out"] | None = None,
    ) -> "AbstractDictionary":
        """The module that does on raw x what this one does on scale·(x − mean), its latents in units of x: z/scale.

        A transcoder's target was scale_out·(y − mean_out); an autoencoder's is its input.
        """
        scale_out = scale if scale_out is None else scale_out
        mean_out = mean if mean_out is None else mean_out
        new = {name: getattr(self, name) / scale for name in self.in_latent_units}
        if not self.apply_b_dec_to_input:  # otherwise b_dec carries the mean into the encoder
            shift = jnp.einsum("sd,d->s", self.encoder, mean)
            for name, gain in self.biases.items():
                new[name] = new[name] - (shift if gain is None else jnp.exp(getattr(self, gain)) * shift)
        new |= {"decoder": self.decoder * (scale / scale_out), "b_dec": self.b_dec / scale_out + mean_out}
        return eqx.tree_at(lambda m: [getattr(m, name) for name in new], self, list(new.values()))


def written(z: Array | SparseCode | tuple[Array, Array], table: Float[Array, "d_sae width"]) -> Float[Array, "..."]:
    """z · table, from dense latents or from (indices, values)."""
    if isinstance(z, tuple):
        indices, values = z
        return weighted_rows(indices, values, table)
    return jnp.einsum("...s,sd->...d", z, table)


def add_bias(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + bias over the leading axes of x."""
    return x + jnp.expand_dims(bias, range(x.ndim - bias.ndim))


def row_lengths(matrix: Float[Array, "rows ..."]) -> Float[Array, " rows"]:
    """‖row‖ of each site, summed over sites; 1 for a row of zeros, which has no direction."""
    square = jnp.sum(jnp.square(matrix), axis=-1)
    lengths = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    lengths = jnp.sum(lengths, axis=tuple(range(1, lengths.ndim)))
    return jnp.where(lengths > 0, lengths, 1.0)


def initial(
    d_model: int, d_sae: int, d_out: int | None, key: PRNGKeyArray, encoder_norm: float = 1.0
) -> dict[str, Any]:
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
    parts = {"encoder": encoder_norm * encoder, "b_enc": b_enc, "decoder": decoder, "b_dec": b_dec}
    return parts | {"apply_b_dec_to_input": d_out is None}


def _unit_rows(matrix: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
    return matrix / jnp.linalg.norm(matrix, axis=-1, keepdims=True)
