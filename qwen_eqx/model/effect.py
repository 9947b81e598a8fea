"""What a model computes from a document, and what edits do to its predictions: one compiled pass per bucket of lengths."""

from collections.abc import Iterable, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from qwen_eqx.errors import InputError
from qwen_eqx.model.edits import AbstractEdit, EditTap, Replace, resolve_edits
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import Site
from qwen_eqx.text.ids import bucket, check_ids, pad_right

Tokens = Sequence[int] | Int[Array | np.ndarray, " tokens"]


class Given(eqx.Module):
    """x -> value, whatever x is: for a `Replace` by what was made of this or earlier sites before.

    What is read there does not change with what is written there or later, so the value is known beforehand; and as only
    an array changes, one compilation serves all dictionaries. Rows past the end of x are not read.
    """

    value: Float[Array, "rows width"]

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        if self.value.shape[0] < x.shape[1]:
            raise InputError(f"Given.value: found {self.value.shape[0]} rows, expected one for each of {x.shape[1]}")
        return jnp.broadcast_to(self.value[None, : x.shape[1]], x.shape)


def captured(model: Qwen, tokens: Tokens, sites: Iterable[str]) -> dict[str, Float[Array, "seq width"]]:
    """What stands at each site when the model reads these tokens, in one pass."""
    return model.run_with_capture(tokens, sites, logits=None)[1]


def captured_padded(model: Qwen, tokens: Tokens, sites: Iterable[str]) -> dict[str, Float[Array, "rows width"]]:
    """The same with the rows of the pads, up to the bucket: few shapes, so what is made of them compiles rarely."""
    names = tuple(dict.fromkeys(sites))
    values = _captured(model, _padded(model, tokens), names)
    return {name: values[name] for name in names}


class Effect(eqx.Module):
    """What edits do to the predictions of a document, in nats, summed; p is the model's, q the edited one's.

    Every token but the first is predicted. `a + b` is the effect on both documents.
    """

    ce: Float32[Array, ""]  # Σ −log p(token)
    ce_edited: Float32[Array, ""]  # Σ −log q(token)
    kl: Float32[Array, ""]  # Σ KL(p ‖ q) = Σ Σ p (log p − log q); 0 where nothing changes
    change: Float32[Array, ""]  # the largest |logit of q − logit of p|; exactly 0 for an identity
    predictions: Int[Array, ""]

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(
            self.ce + other.ce,
            self.ce_edited + other.ce_edited,
            self.kl + other.kl,
            jnp.maximum(self.change, other.change),
            self.predictions + other.predictions,
        )


def effect(model: Qwen, tokens: Tokens, edits: Sequence[AbstractEdit]) -> Effect:
    """Cross-entropy of the next token with and without the edits, of any number of sites, and KL between the two."""
    return effects(model, tokens, {"edited": edits})["edited"]


def effects(model: Qwen, tokens: Tokens, runs: Mapping[str, Sequence[AbstractEdit]]) -> dict[str, Effect]:
    """The effect of each of several runs, compared with one plain run: name -> edits in, name -> effect out.

    One compilation per bucket, names, sites and kinds of edits; arrays inside the edits may change.
    """
    resolved = {name: resolve_edits(edits, model.config, rows=1) for name, edits in runs.items()}
    made = _effects(model, resolved, _padded(model, tokens), jnp.asarray(len(tokens), jnp.int32))
    return {name: made[name] for name in runs}


def _padded(model: Qwen, tokens: Tokens) -> Int[Array, " rows"]:
    ids = check_ids(tokens, model.config.vocab, name="tokens")
    return jnp.asarray(pad_right([ids], bucket(len(ids)), 0)[0])


@eqx.filter_jit
def _captured(model: Qwen, tokens: Int[Array, " rows"], sites: tuple[str, ...]) -> dict[str, Array]:
    return model.run_with_capture(tokens, sites, logits=None)[1]


def _same(x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
    return x


@eqx.filter_jit
def _effects(
    model: Qwen, runs: dict[str, tuple[AbstractEdit, ...]], tokens: Int[Array, " rows"], length: Int[Array, ""]
) -> dict[str, Effect]:
    places = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    sites = {Site.parse(edit.site, model.config) for edits in runs.values() for edit in edits}
    # every run puts back as it was what it does not edit but another run does, the plain one all of it: without any edit
    # XLA may keep the bf16 stream in float32 there, and an identity would seem to change something
    back = [Replace(_same, site=site) for site in sorted(sites)]

    def logits(edits: tuple[AbstractEdit, ...]) -> Float32[Array, "rows vocab"]:
        edited = {edit.site for edit in edits}
        all_edits = (*edits, *(same for same in back if same.site not in edited))
        tap = EditTap(all_edits, places[None], length[None], model.config)
        x, _ = model.forward(tokens[None], jnp.zeros(1, jnp.int32), tap=tap)
        return model.logits(x, tap)[0]

    plain = logits(())
    return {name: _compared(plain, logits(edits), tokens, length) for name, edits in runs.items()}


def _compared(
    plain: Float32[Array, "rows vocab"],
    edited: Float32[Array, "rows vocab"],
    tokens: Int[Array, " rows"],
    length: Int[Array, ""],
) -> Effect:
    log_p, log_q = (jax.nn.log_softmax(table[:-1], axis=-1) for table in (plain, edited))
    places = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    predicts = places[:-1] < length - 1

    def total(per_token: Float32[Array, " predicted"]) -> Float32[Array, ""]:
        return jnp.sum(jnp.where(predicts, per_token, 0.0))

    def cross_entropy(log_probs: Float32[Array, "predicted vocab"]) -> Float32[Array, ""]:
        return -total(jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1)[:, 0])

    return Effect(
        ce=cross_entropy(log_p),
        ce_edited=cross_entropy(log_q),
        kl=total(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)),
        change=jnp.max(jnp.where((places < length)[:, None], jnp.abs(edited - plain), 0.0)),
        predictions=jnp.maximum(length - 1, 0),
    )
