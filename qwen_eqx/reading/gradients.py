"""Gradients with respect to activations: how a loss changes with what stands at a site."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from qwen_eqx.errors import InputError
from qwen_eqx.model.edits import AbstractEdit, EditTap, check_positions, resolve_edits
from qwen_eqx.model.effect import Tokens
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import Activation, Site, Tap
from qwen_eqx.text.ids import check_ids

Loss = Callable[[Float32[Array, "*seq vocab"]], Float[Array, ""]]  # of all positions' logits, or of the last one's
Which = Literal["all", "last"]


def grad_at(
    model: Qwen,
    tokens: Tokens,
    sites: Iterable[str | Site],
    loss: Loss,
    *,
    edits: Sequence[AbstractEdit] = (),
    logits: Which = "all",
) -> tuple[Float32[Array, ""], dict[Any, Float32[Array, "..."]]]:
    """loss(logits) of one prompt, and ∂loss/∂x at each site, keyed as asked, where x is what `edits` leave there.

    Any kind of site, patterns too. `loss` meets the logits [seq, vocab], or with `logits="last"` [vocab]. Compiled once for
    each length, set of sites, kinds of edits and loss: pass the same function again, not a new lambda.
    """
    names = {name: Site.parse(name, model.config) for name in sites}
    ids = one_prompt(model, tokens, "tokens")
    check_which(logits)
    resolved = resolve_edits(edits, model.config, rows=1)
    check_positions(resolved, np.asarray([ids.shape[1]]))
    value, grads = _grads(model, resolved, ids, tuple(dict.fromkeys(names.values())), loss, logits)
    return value, {name: grads[site] for name, site in names.items()}


def one_prompt(model: Qwen, tokens: Tokens, name: str) -> Int[Array, "1 seq"]:
    """The ids of one prompt as a batch of one; refused unless they fit the model."""
    ids = check_ids(tokens, model.config.vocab, name=name)
    if not 1 <= len(ids) <= model.config.max_seq:
        raise InputError(f"{name}: found {len(ids)} tokens, expected 1..{model.config.max_seq}, which the model holds")
    return jnp.asarray([ids], jnp.int32)


def check_which(logits: str) -> None:
    """Raises `InputError` unless `logits` says of which positions."""
    if logits not in ("all", "last"):
        raise InputError(f"logits: found {logits!r}, expected 'all' or 'last'")


def table_of(model: Qwen, tokens: Int[Array, "1 seq"], tap: Tap, logits: Which) -> Float32[Array, "*seq vocab"]:
    """The logits of a pass with this tap."""
    x, _ = model.forward(tokens, jnp.zeros(1, jnp.int32), tap=tap)
    normed = model.normed(x, tap)[0]
    return model.unembed(normed if logits == "all" else normed[-1])


class _Shifted:
    """A tap that adds to what stands at each site, after `inner`: the loss is differentiated by what is added."""

    def __init__(self, added: dict[Site, Float32[Array, "..."]], inner: EditTap):
        self.added, self.inner = added, inner
        self.asks = frozenset(added) | inner.asks

    def __call__(self, site: Site, value: Activation) -> Activation:
        value = self.inner(site, value)
        return value + self.added[site][None].astype(value.dtype) if site in self.added else value


@eqx.filter_jit
def _grads(
    model: Qwen,
    edits: tuple[AbstractEdit, ...],
    tokens: Int[Array, "1 seq"],
    sites: tuple[Site, ...],
    loss: Loss,
    logits: Which,
) -> tuple[Float32[Array, ""], dict[Site, Float32[Array, "..."]]]:
    config, seq = model.config, tokens.shape[1]
    inner = EditTap(edits, jnp.arange(seq, dtype=jnp.int32)[None], jnp.asarray([seq], jnp.int32), config)

    def shifted(added: dict[Site, Float32[Array, "..."]]) -> Float32[Array, ""]:
        return jnp.asarray(loss(table_of(model, tokens, _Shifted(added, inner), logits)), jnp.float32)

    return jax.value_and_grad(shifted)({site: jnp.zeros(site.shape(config, seq), jnp.float32) for site in sites})
