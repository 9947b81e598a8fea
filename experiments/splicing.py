"""A model with an SAE in it: read its site, replace the activation there, count what the model loses."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

import qwen_eqx
import sae
from qwen_eqx.tokenizer import bucket


class Clamped(eqx.Module):
    """x -> decode(z(x) with z_latent = value): what an SAE gives when one latent is held."""

    module: sae.AbstractSAE
    latent: Int[Array, ""]
    value: Float[Array, ""]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        z = self.module.encode(x)
        return self.module.decode(z.at[..., self.latent].set(self.value))


def site_of(
    config: qwen_eqx.QwenConfig, module: sae.AbstractSAE, metadata: dict[str, Any], layer: int | None, site: str | None
) -> str:
    """The site asked for, or the one the SAE's metadata name; its width must be the SAE's."""
    if layer is not None and site is not None:
        raise sae.InputError(f"--layer, --site: found both ({layer}, {site}), expected one of them")
    named = site or metadata.get("hook_name")
    if layer is not None:
        named = str(qwen_eqx.Site(layer, "resid_post"))
    if named is None:
        raise sae.InputError("--site: found none and the SAE names none, expected --layer or --site")
    place = qwen_eqx.Site.parse(str(named), config)
    if (module.d_model, module.d_out) != (place.width(config), place.width(config)):
        found = f"an SAE from {module.d_model} to {module.d_out}"
        raise sae.InputError(f"--sae: found {found}, expected {place.width(config)} to itself, the width of {place}")
    return str(place)


def activation(model: qwen_eqx.Qwen, tokens: Sequence[int], site: str) -> Float[Array, "seq d_model"]:
    """What stands at the site when the model reads these tokens."""
    return _activation(model, _padded(tokens), site)[: len(tokens)]


def recovered(
    model: qwen_eqx.Qwen, module: sae.AbstractSAE, documents: Sequence[Sequence[int]], site: str
) -> dict[str, float]:
    """`sae.metrics.recovered` over all tokens of many documents, one at a time so that their logits never meet.

    `identity` is the largest change of any logit when the SAE is spliced in with its error term: 0.
    """
    sums, identity, count = jnp.zeros(5, jnp.float32), jnp.float32(0), 0
    for tokens in documents:
        part, changed = _losses(model, module, _padded(tokens), jnp.int32(len(tokens)), site)
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
def _activation(model: qwen_eqx.Qwen, tokens: Int[Array, " seq"], site: str) -> Float[Array, "seq d_model"]:
    return model.run_with_capture(tokens, [site])[1][site]


def _same(x: Array) -> Array:
    return x


@eqx.filter_jit
def _losses(
    model: qwen_eqx.Qwen, module: sae.AbstractSAE, tokens: Int[Array, " seq"], length: Int[Array, ""], site: str
) -> tuple[Float32[Array, " sums"], Float32[Array, ""]]:
    """Sums over the document's predictions of CE, CE spliced, CE zeroed, KL spliced, KL zeroed; and the identity's."""

    def logits(*edits: qwen_eqx.AbstractEdit) -> Array:
        return model.run_with_capture(tokens, [], edits=edits)[0]

    # the baseline puts the site back as it was: without any edit XLA would keep the bf16 stream in float32 there
    plain = logits(qwen_eqx.Replace(_same, site=site))
    kept = logits(qwen_eqx.Replace(module, error_of=module, site=site))
    tables = [plain, logits(qwen_eqx.Replace(module, site=site)), logits(qwen_eqx.Ablate(site=site))]
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
