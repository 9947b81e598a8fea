"""A transcoder for every MLP of a model: what the latents of a layer read and write, row by row."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sae.errors import InputError
from sae.forms.abstract import AbstractDictionary, AbstractSAE
from sae.forms.clt import CLT
from sae.forms.skip import SkipTranscoder

_CHUNK = 8192  # rows of an encoder on the device at once: a published one fills gigabytes


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """z = π · 1[π > threshold] with π = encoder · x + b_enc; z · decoder + b_dec + x · skip is added up by layers.

    Decoder rows are of this layer's MLP and, across layers, of all later ones. The arrays lie in memory or are mapped
    from a file, of which no more is read than is asked for.
    """

    encoder: Float[np.ndarray, "d_sae d_model"]
    b_enc: Float[np.ndarray, " d_sae"]
    decoder: Float[np.ndarray, "d_sae out d_model"]
    b_dec: Float[np.ndarray, " d_model"]
    threshold: Float[np.ndarray, " d_sae"] | None = None  # 0 without one: ReLU
    skip: Float[np.ndarray, "d_model d_model"] | None = None
    rule: Callable[[Array], Array] | None = None  # x -> z, of a dictionary whose latents fire by more than a threshold

    @classmethod
    def of(cls, module: AbstractSAE) -> "Layer":
        """Of one dictionary, with all that it does to its input inside the rows."""
        bias, gain = list(module.biases.items())[-1]  # Gated: of the path that says how strongly
        encoder, b_enc = np.asarray(module.encoder), np.asarray(getattr(module, bias))
        if gain is not None:
            encoder = encoder * np.exp(np.asarray(getattr(module, gain)))[:, None]
        if module.apply_b_dec_to_input:
            b_enc = b_enc - encoder @ np.asarray(module.b_dec)
        by_more = len(module.biases) > 1 or getattr(module, "exactly_k", False)
        threshold = _learned(module)
        return cls(
            encoder=encoder,
            b_enc=b_enc,
            decoder=np.asarray(module.decoder)[:, None],
            b_dec=np.asarray(module.b_dec),
            threshold=np.broadcast_to(threshold, b_enc.shape) if threshold.any() else None,
            skip=np.asarray(module.skip).T if isinstance(module, SkipTranscoder) else None,
            rule=eqx.filter_jit(module.encode) if by_more else None,
        )

    @classmethod
    def across(cls, module: CLT) -> list["Layer"]:
        """Of a cross-layer transcoder, one for each layer."""
        encoder, b_enc, decoder, b_dec = map(np.asarray, (module.encoder, module.b_enc, module.decoder, module.b_dec))
        threshold = np.full(module.per_layer, _learned(module))
        parts = [slice(at * module.per_layer, (at + 1) * module.per_layer) for at in range(module.sites)]
        return [
            cls(encoder[own], b_enc[own], decoder[own, at:], b_dec[at], threshold if threshold.any() else None)
            for at, own in enumerate(parts)
        ]


def _learned(module: AbstractDictionary) -> np.ndarray:
    """The thresholds of a dictionary; 0 where its form has none."""
    threshold = np.asarray(getattr(module, "threshold", 0.0), np.float32)
    if threshold.min() < 0:
        raise InputError(
            f"threshold: found none learned, expected one: train the {module.name}, or take `with_threshold(rows)`"
        )
    return threshold


@dataclasses.dataclass(frozen=True, eq=False)
class Transcoders:
    """One transcoder a layer, from the first to the last; all are equally wide.

    Sites are kinds, as TransformerLens spells them after `blocks.N.`: such as `hook_resid_mid` and `hook_mlp_out`.
    """

    layers: tuple[Layer, ...]
    input_site: str
    output_site: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # model_name, scan and what else is said

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("transcoders: found none, expected one for every layer")
        sizes = self.d_sae, self.d_model
        for at, layer in enumerate(self.layers):
            out = self.n_layers - at if self.crosses else 1
            if layer.encoder.shape != sizes or layer.decoder.shape != (sizes[0], out, sizes[1]):
                raise InputError(
                    f"transcoders: layer {at}: found an encoder {layer.encoder.shape} and a decoder {layer.decoder.shape}, "
                    f"expected {sizes} and {(sizes[0], out, sizes[1])}"
                )

    def __repr__(self) -> str:
        kind = "cross-layer, " if self.crosses else ""
        sizes = f"n_layers={self.n_layers}, d_model={self.d_model}, d_sae={self.d_sae}"
        return f"Transcoders({kind}{self.input_site} to {self.output_site}, {sizes})"

    @classmethod
    def of(
        cls,
        dictionaries: Sequence[AbstractSAE] | CLT,
        input_site: str = "hook_resid_mid",
        output_site: str = "hook_mlp_out",
        metadata: Mapping[str, Any] | None = None,
    ) -> "Transcoders":
        """Of dictionaries trained here, one a layer, or of one across layers."""
        crossing = isinstance(dictionaries, CLT)
        layers = Layer.across(dictionaries) if crossing else [Layer.of(module) for module in dictionaries]
        return cls(tuple(layers), input_site, output_site, dict(metadata or {}))

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def d_sae(self) -> int:
        """Latents of one layer."""
        return self.layers[0].encoder.shape[0]

    @property
    def d_model(self) -> int:
        return self.layers[0].encoder.shape[1]

    @property
    def crosses(self) -> bool:
        """Whether a latent writes its own layer's MLP output and those of all later layers."""
        return self.layers[0].decoder.shape[1] > 1

    @property
    def skips(self) -> bool:
        """Whether some layer adds x · skip."""
        return any(layer.skip is not None for layer in self.layers)

    def encode(self, layer: int, x: Float[Array, "pos d_model"]) -> Float[Array, "pos d_sae"]:
        """The latents of a layer, float32; its whole encoder is read, some thousand rows at a time."""
        one, x = self._layer(layer), x.astype(jnp.float32)  # a model may compute in bf16
        if one.rule is not None:
            return one.rule(x)
        threshold = np.zeros(self.d_sae, np.float32) if one.threshold is None else one.threshold
        parts = [
            _encoded(x, *(jnp.asarray(array[at : at + _CHUNK]) for array in (one.encoder, one.b_enc, threshold)))
            for at in range(0, self.d_sae, _CHUNK)
        ]
        return jnp.concatenate(parts, axis=-1)

    def encoder_rows(
        self, layer: int, latents: Int[np.ndarray | Array, " n"]
    ) -> tuple[Float[Array, "n d_model"], Float[Array, " n"]]:
        """(W, b) of some latents: where such a latent fires, its value is W · x + b."""
        one, at = self._layer(layer), self._latents(latents)
        return _float32(one.encoder[at]), _float32(one.b_enc[at])

    def decoder_rows(self, layer: int, latents: Int[np.ndarray | Array, " n"]) -> Float[Array, "n out d_model"]:
        """What some latents write: to the MLP output of their layer and, if they cross layers, of each later one."""
        return _float32(self._layer(layer).decoder[self._latents(latents)])

    def bias(self, layer: int) -> Float[Array, " d_model"]:
        """What is added to the MLP output of a layer whatever fires."""
        return _float32(self._layer(layer).b_dec)

    def skip(self, layer: int) -> Float[Array, "d_model d_model"] | None:
        """The matrix of x · skip, which is added to the MLP output of a layer; None where nothing is."""
        skip = self._layer(layer).skip
        return None if skip is None else _float32(skip)

    def _layer(self, layer: int) -> Layer:
        if not 0 <= layer < self.n_layers:
            raise InputError(f"layer: found {layer}, expected 0 to {self.n_layers - 1}")
        return self.layers[layer]

    def _latents(self, latents: Int[np.ndarray | Array, " n"]) -> np.ndarray:
        at = np.asarray(latents)
        if at.size and not 0 <= at.min() <= at.max() < self.d_sae:
            raise InputError(f"latents: found {at.min()} to {at.max()}, expected 0 to {self.d_sae - 1}")
        return at


@jax.jit
def _encoded(
    x: Float[Array, "pos d_model"],
    encoder: Float[Array, "chunk d_model"],
    b_enc: Float[Array, " chunk"],
    threshold: Float[Array, " chunk"],
) -> Float[Array, "pos chunk"]:
    """π · 1[π > threshold] in float32, in whatever precision the rows were stored."""
    encoder, b_enc, threshold = (array.astype(jnp.float32) for array in (encoder, b_enc, threshold))
    pre = jnp.einsum("pd,sd->ps", x, encoder) + b_enc[None]
    return jnp.where(pre > threshold[None], pre, 0.0)


def _float32(array: np.ndarray) -> Array:
    return jnp.asarray(np.asarray(array, np.float32))
