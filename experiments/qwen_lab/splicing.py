"""A model with an SAE in it: read its site, replace the activation there, count what the model loses."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

import qwen_eqx
import sae
from qwen_eqx.text.tokenizer import bucket
from qwen_lab.places import Place


class Clamped(eqx.Module):
    """x -> decode(z(x) with z_latent = value): what an SAE gives when one latent is held."""

    module: sae.AbstractSAE
    latent: Int[Array, ""]
    value: Float[Array, ""]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_model"]:
        z = self.module.encode(x)
        return self.module.decode(z.at[..., self.latent].set(self.value))


def encoded(module: sae.AbstractSAE, x: Float[Array, "seq d_model"]) -> Float[np.ndarray, "seq d_sae"]:
    """The latents of one document, on the host; one compilation for all documents of a bucket."""
    room = bucket(len(x))
    return np.asarray(_encode(module, jnp.pad(x, ((0, room - len(x)), (0, 0)))))[: len(x)]


@eqx.filter_jit
def _encode(module: sae.AbstractSAE, x: Float[Array, "seq d_model"]) -> Float[Array, "seq d_sae"]:
    return module.encode(x)


class Given(eqx.Module):
    """x -> value, whatever x is: what an SAE made of a site before."""

    value: Float[Array, "seq width"]

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        return jnp.broadcast_to(self.value[None], x.shape)


def captured(model: qwen_eqx.Qwen, tokens: Sequence[int], sites: Sequence[str]) -> dict[str, Float[Array, "seq width"]]:
    """What stands at each site when the model reads these tokens, in one pass."""
    acts = _captured(model, _padded(tokens), tuple(dict.fromkeys(sites)))
    return {site: values[: len(tokens)] for site, values in acts.items()}


def recovered(
    model: qwen_eqx.Qwen, module: sae.AbstractSAE, documents: Sequence[Sequence[int]], place: Place
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
def _output(module: sae.AbstractSAE, x: Float[Array, "seq d_model"]) -> Float[Array, "seq d_out"]:
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
