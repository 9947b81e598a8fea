"""Logit lens: what the head would say at every depth, head(norm(x))."""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from qwen_eqx.errors import InputError
from qwen_eqx.model.effect import Tokens, captured_padded
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import Site
from qwen_eqx.reading.labelled import Labelled
from qwen_eqx.text.ids import check_ids


@dataclasses.dataclass(frozen=True)
class Lens:
    """What the model would predict after each position, if the residual stream went to the head from each site."""

    ids: Labelled  # [site, position, rank]: the likeliest tokens
    log_probs: Labelled  # [site, position, rank]: theirs
    targets: Labelled  # [site, position, target]: log-probabilities of the tokens asked about


def logit_lens(
    model: Qwen, tokens: Tokens, *, sites: Sequence[str] | None = None, targets: Sequence[int] = (), k: int = 5
) -> Lens:
    """log softmax(head(norm(x))) at d_model-wide sites (nostalgebraist 2020); None: the stream before and after each block.

    At the last block's `hook_resid_post` it is what the model predicts. Logits are made of one site at a time.
    """
    config = model.config
    if sites is None:
        sites = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(config.layers))]
    for name in sites:
        found = Site.parse(name, config)
        if found.width(config) != config.d_model:
            raise InputError(f"sites: found {name!r}, {found.width(config)} wide, expected one {config.d_model} wide")
    if not 1 <= k <= config.vocab:
        raise InputError(f"k: found {k}, expected 1..{config.vocab}")
    asked = jnp.asarray(check_ids(targets, config.vocab, name="targets"), jnp.int32)
    acts = captured_padded(model, tokens, sites)
    seq = len(tokens)
    made = _lens(model, jnp.stack([acts[name] for name in sites]), asked, k)
    ids, log_probs, chosen = (np.asarray(part)[:, :seq] for part in made)
    labels = {"site": tuple(sites), "position": tuple(range(seq))}
    ranks = labels | {"rank": tuple(range(k))}
    named = labels | {"target": tuple(asked.tolist())}
    return Lens(Labelled(ids, ranks), Labelled(log_probs, ranks), Labelled(chosen, named))


@eqx.filter_jit
def _lens(
    model: Qwen, acts: Float[Array, "sites rows d_model"], targets: Int[Array, " targets"], k: int
) -> tuple[Int[Array, "sites rows k"], Float32[Array, "sites rows k"], Float32[Array, "sites rows targets"]]:
    def at(x: Float[Array, "rows d_model"]) -> tuple[Array, Array, Array]:
        table = jax.nn.log_softmax(model.logits(x), axis=-1)
        log_probs, ids = jax.lax.top_k(table, k)
        return ids, log_probs, table[:, targets]

    return jax.lax.map(at, acts)
