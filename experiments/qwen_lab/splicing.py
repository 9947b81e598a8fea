"""A model with an SAE in it: read its site, replace the activation there, count what the model loses."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

import arc
import qwen_eqx
import sae
from qwen_eqx.text.ids import bucket
from qwen_lab import places
from qwen_lab.places import Place


class Clamped(eqx.Module):
    """x -> decode(z(x) with z_latent = value): what an SAE gives when one latent is held."""

    module: sae.AbstractDictionary
    latent: Int[Array, ""]
    value: Float[Array, ""]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        z = self.module.encode(x)
        return self.module.decode(z.at[..., self.latent].set(self.value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnModel:
    """The flags of what puts SAEs into a model; unless said, an SAE's metadata name the model, the place and the tasks."""

    model: str | None = None
    """Embedded name, directory or hub id; without it the model that the SAE names."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the model."""
    layer: int | None = None
    """Residual stream after this block; without it the site that the SAE names."""
    site: str | None = None
    """Any other place, as TransformerLens or Hugging Face spell it."""
    target_site: str | None = None
    """Site that a transcoder writes; without it the one that it names."""
    tasks: str | None = None
    """Data set; without it the SAE's own held-out tasks, or the evaluation set of ARC-AGI-1."""
    encoder: str = arc.DEFAULT_ENCODER
    """How grids become text."""
    prompt: str = arc.DEFAULT_PROMPT
    """Prompt format."""

    def load_model(self, metadata: Sequence[Mapping[str, Any]]) -> tuple[qwen_eqx.Qwen, qwen_eqx.Tokenizer, str]:
        """The model asked for, or the one that all of these SAEs name; and its name."""
        names = {str(one.get("model_name", "tiny-arc")) for one in metadata}
        if self.model is None and len(names) != 1:
            raise sae.InputError(f"--sae: found SAEs of {', '.join(sorted(names))}, expected one model's, or --model")
        name = self.model or names.pop()
        model, tokenizer = qwen_eqx.from_pretrained(name, revision=self.revision, dtype=jnp.dtype(self.dtype))
        return model, tokenizer, name

    def place(self, config: qwen_eqx.QwenConfig, module: sae.AbstractDictionary, metadata: Mapping[str, Any]) -> Place:
        """The place asked for, or the one the SAE's metadata name; its widths must be the SAE's."""
        reads, writes = metadata.get("hook_name"), metadata.get("hook_name_out")
        target = self.target_site or (str(writes) if writes and writes != reads else None)
        default = None if reads is None else str(reads)
        place = places.from_flags(places.in_model(config), default, self.layer, self.site, target)
        widths = tuple(qwen_eqx.Site.parse(site, config).width(config) for site in (place.reads, place.writes))
        if (module.reads[-1], module.writes[-1]) != widths:
            found = f"an SAE from {module.reads[-1]} to {module.writes[-1]}"
            raise sae.InputError(f"--sae: found {found}, expected {widths[0]} to {widths[1]}, the widths at {place}")
        return place


class Given(eqx.Module):
    """x -> value, whatever x is: what an SAE made of a site before."""

    value: Float[Array, "seq width"]

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        return jnp.broadcast_to(self.value[None], x.shape)


def captured(model: qwen_eqx.Qwen, tokens: Sequence[int], sites: Sequence[str]) -> dict[str, Float[Array, "seq width"]]:
    """What stands at each site when the model reads these tokens, in one pass."""
    found = _captured(model, _padded(tokens), tuple(dict.fromkeys(sites)))
    return {site: values[: len(tokens)] for site, values in found.items()}


def encoded(module: sae.AbstractDictionary, x: Float[Array, "seq d_model"]) -> Float[np.ndarray, "seq d_sae"]:
    """The latents of one document, on the host; one compilation for all documents of a bucket."""
    room = bucket(len(x))
    return np.asarray(_encode(module, jnp.pad(x, ((0, room - len(x)), (0, 0)))))[: len(x)]


def recovered(
    model: qwen_eqx.Qwen, module: sae.AbstractDictionary, documents: Sequence[Sequence[int]], place: Place
) -> dict[str, float]:
    """`sae.metrics.recovered` over all tokens of many documents, one at a time so that their logits never meet.

    What a transcoder makes of the site it reads replaces the site it writes. `identity` is the largest change of any
    logit when the SAE is spliced in with its error term: 0.
    """
    sums, identity, count = jnp.zeros(5, jnp.float32), jnp.float32(0), 0
    for tokens in documents:
        padded = _padded(tokens)
        # nothing at the site that is read changes with what is written, there or later: the output is known beforehand,
        # and the model is compiled once for all SAEs
        made = Given(_output(module, _captured(model, padded, (place.reads,))[place.reads]))
        part, changed = _losses(model, made, padded, jnp.int32(len(tokens)), place.writes)
        sums, identity, count = sums + part, jnp.maximum(identity, changed), count + len(tokens) - 1
    ce, ce_sae, ce_zero, kl_sae, kl_zero = (float(value) / max(count, 1) for value in sums)
    gap = ce_zero - ce
    return {
        "ce": ce,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "ce_recovered": (ce_zero - ce_sae) / gap if gap else float("nan"),
        "kl_sae": kl_sae,
        "kl_zero": kl_zero,
        "kl_recovered": 1.0 - kl_sae / kl_zero if kl_zero else float("nan"),
        "identity": float(identity),
    }


def _padded(tokens: Sequence[int]) -> Int[Array, " seq"]:
    """Zeros on the right up to a bucket: no position sees a later one."""
    return jnp.asarray([*tokens, *[0] * (bucket(len(tokens)) - len(tokens))], jnp.int32)


@eqx.filter_jit
def _captured(model: qwen_eqx.Qwen, tokens: Int[Array, " seq"], sites: tuple[str, ...]) -> dict[str, Array]:
    return model.run_with_capture(tokens, sites)[1]


@eqx.filter_jit
def _encode(module: sae.AbstractDictionary, x: Float[Array, "seq d_model"]) -> Float[Array, "seq d_sae"]:
    return module.encode(x)


@eqx.filter_jit
def _output(module: sae.AbstractDictionary, x: Float[Array, "seq d_model"]) -> Float[Array, "seq d_out"]:
    return module(x)


def _same(x: Array) -> Array:
    return x


@eqx.filter_jit
def _losses(
    model: qwen_eqx.Qwen, made: Given, tokens: Int[Array, " seq"], length: Int[Array, ""], site: str
) -> tuple[Float32[Array, " sums"], Float32[Array, ""]]:
    """Sums over the document's predictions of CE, CE spliced, CE zeroed, KL spliced, KL zeroed; and the identity's."""

    def logits(edit: qwen_eqx.AbstractEdit) -> Array:
        return model.run_with_capture(tokens, [], edits=[edit])[0]

    # the baseline puts the site back as it was: without any edit XLA would keep the bf16 stream in float32 there
    plain = logits(qwen_eqx.Replace(_same, site=site))
    kept = logits(qwen_eqx.Replace(made, error_of=made, site=site))
    tables = plain, logits(qwen_eqx.Replace(made, site=site)), logits(qwen_eqx.Ablate(site=site))
    clean, spliced, zero = (jax.nn.log_softmax(table[:-1], axis=-1) for table in tables)
    counted = jnp.arange(tokens.shape[0] - 1) < length - 1

    def total(per_token: Array) -> Array:
        return jnp.sum(jnp.where(counted, per_token, 0.0))

    def cross_entropy(log_probs: Array) -> Array:
        return -total(jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1)[:, 0])

    def divergence(other: Array) -> Array:
        return total(jnp.sum(jnp.exp(clean) * (clean - other), axis=-1))

    inside = (jnp.arange(tokens.shape[0]) < length)[:, None]
    changed = jnp.max(jnp.where(inside, jnp.abs(kept - plain), 0.0))
    ce = [cross_entropy(table) for table in (clean, spliced, zero)]
    return jnp.stack([*ce, divergence(spliced), divergence(zero)]), changed
