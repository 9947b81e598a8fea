"""Path patching: what a part says to chosen receivers alone, everything between held."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from qwen_eqx.errors import InputError
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.effect import Tokens
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import Activation, Site
from qwen_eqx.reading.gradients import Loss, Which
from qwen_eqx.reading.patching import AT_ONCE, Listed, Metrics, Patched, Places, Put, Runs, Values

Masks = dict[Site, Bool[Array, " width"]]  # which columns of each receiving site


@dataclasses.dataclass(frozen=True)
class Paths:
    """What says something, to whom, and what is held between."""

    receivers: Mapping[str, Sequence[int] | None]  # site -> its heads, None: all of it
    senders: Places = Places("z", "head")  # noqa: RUF009  a frozen value; one at a time
    mlps: Literal["held", "free"] = "held"  # on the way; heads are held always


def path_patch(
    model: Qwen,
    clean: Tokens,
    corrupted: Tokens,
    metric: Loss,
    paths: Paths,
    *,
    logits: Which = "last",
    at_once: int = AT_ONCE,
) -> Patched:
    """The metric where only the receivers meet a sender's clean value (arXiv 2211.00593).

    First the corrupted run with the sender's clean value, every other head held as it was, MLPs too unless "free": what the
    receivers are then. Second the corrupted run with the receivers so. The last block's `hook_resid_post` as receiver gives
    direct effects on the logits.
    """
    runs = Runs.of(model, clean, corrupted, metric, logits)
    listed = Listed.of(model.config, paths.senders, runs.seq)
    if paths.mlps not in ("held", "free"):
        raise InputError(f"Paths.mlps: found {paths.mlps!r}, expected 'held' or 'free'")
    if not paths.receivers:
        raise InputError("Paths.receivers: found none, expected site -> heads, or site -> None")
    chosen = {Site.parse(name, model.config): heads for name, heads in paths.receivers.items()}
    masks = {site: _columns(site, heads, model.config) for site, heads in chosen.items()}
    held = ("z", "mlp_out") if paths.mlps == "held" else ("z",)
    return listed.labelled(_path_patched(runs, listed.chunks(at_once), listed.sites, masks, held))


def _columns(site: Site, heads: Sequence[int] | None, config: QwenConfig) -> Bool[Array, " width"]:
    width, count = site.width(config), site.heads(config)
    if site.kind == "pattern":
        raise InputError(f"Paths.receivers: found site '{site}', which can be read only, expected another")
    if heads is None:
        return jnp.ones(width, bool)
    if wrong := [head for head in heads if not 0 <= head < count]:
        expected = f"0..{count - 1}" if count else "None, as it has none"
        raise InputError(f"Paths.receivers: found head {wrong[0]} at site '{site}', expected {expected}")
    return jnp.asarray(np.isin(np.arange(width) // site.per_head(config), list(heads)))


class _Received:
    """A tap that puts values in at some columns of some sites."""

    def __init__(self, values: Values, masks: Masks):
        self.values, self.masks = values, masks
        self.asks = frozenset(masks)

    def __call__(self, site: Site, value: Activation) -> Activation:
        return jnp.where(self.masks[site][None, None], self.values[site], value) if site in self.masks else value


@eqx.filter_jit
def _path_patched(
    runs: Runs, rows: Int[Array, "chunks at_once 3"], sites: tuple[Site, ...], masks: Masks, held: tuple[str, ...]
) -> Metrics:
    config = runs.model.config
    clean, before = runs.recorded(runs.clean, sites)
    own, _ = runs.recorded(runs.corrupted, [Site(layer, kind) for layer in range(config.layers) for kind in held])

    def metric(row: Int[Array, "3"]) -> Float32[Array, ""]:
        received, _ = runs.recorded(runs.corrupted, masks, Put(row, clean, sites[0].heads(config), own))
        return runs.recorded(runs.corrupted, tap=_Received(received, masks))[1]

    return jax.lax.map(jax.vmap(metric), rows), before
