"""Evaluation on held-out rows: totals that add up batch by batch, then each metric with its formula and direction."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from sae.errors import InputError
from sae.forms.abstract import AbstractDictionary
from sae.forms.objective import flat


class Totals(eqx.Module):
    """Sums over groups (positions, tasks, or one) from which every metric follows; two of them add leaf by leaf."""

    rows: Float32[Array, " groups"]
    error: Float32[Array, " groups"]  # Σ‖y − ŷ‖²
    variance: Float32[Array, " groups"]  # Σ‖y − ȳ‖², ȳ the mean given
    l0: Float32[Array, " groups"]  # Σ fired latents
    cosine: Float32[Array, " groups"]
    norm_ratio: Float32[Array, " groups"]
    fired: Int32[Array, " d_sae"]  # rows in which each latent fired


@eqx.filter_jit
def totals(
    module: AbstractDictionary,
    x: Float[Array, "rows ..."],
    mean: Float[Array, "..."],
    group: Int[Array, " rows"] | None = None,
    groups: int = 1,
    target: Float[Array, "rows ..."] | None = None,
) -> Totals:
    """The sums of one batch; `group` says which of `groups` each row belongs to, `mean` is a row of what is written."""
    group = jnp.zeros(x.shape[0], jnp.int32) if group is None else group
    y = flat((x if target is None else target).astype(jnp.float32))
    z = module.encode(x)
    y_hat = flat(module.complete(z, x))
    length, length_hat = jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(y_hat, axis=-1)
    dot, both = jnp.sum(y * y_hat, axis=-1), length * length_hat

    def sums(values: Array) -> Array:
        return jnp.zeros(groups, jnp.float32).at[group].add(values.astype(jnp.float32))

    return Totals(
        rows=sums(jnp.ones_like(dot)),
        error=sums(jnp.sum(jnp.square(y - y_hat), axis=-1)),
        variance=sums(jnp.sum(jnp.square(y - mean.reshape(1, -1)), axis=-1)),
        l0=sums(jnp.sum((z > 0).astype(jnp.float32), axis=-1)),
        cosine=sums(jnp.where(both > 0, dot / jnp.where(both > 0, both, 1.0), 0.0)),
        norm_ratio=sums(jnp.where(length > 0, length_hat / jnp.where(length > 0, length, 1.0), 0.0)),
        fired=jnp.sum((z > 0).astype(jnp.int32), axis=0),
    )


def evaluate(
    module: AbstractDictionary, batches: Iterable[Any], mean: Float[Array, "..."], dense_above: float = 0.1
) -> dict[str, float]:
    """Metrics over held-out batches: arrays `rows d_model`, or pairs (x, target) for a transcoder.

    `mean` is the held-out data's mean: the total variance is about it.
    """
    total = None
    for item in batches:
        x, target = item if isinstance(item, tuple) else (item, None)
        part = totals(module, x, mean, target=target)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    if total is None:
        raise InputError("batches: found none, expected at least one batch of held-out rows")
    return summary(total, dense_above)


def summary(total: Totals, dense_above: float = 0.1) -> dict[str, float]:
    """fvu = Σ‖y − ŷ‖²/Σ‖y − ȳ‖² (lower is better); explained_variance = 1 − fvu; l0 = mean count of z > 0;

    dead_fraction: latents that fired in no row; dense_fraction: in more than `dense_above` of the rows;
    cosine = mean ⟨y, ŷ⟩/(‖y‖‖ŷ‖) (1 is best); norm_ratio = mean ‖ŷ‖/‖y‖ (below 1: shrinkage);
    a row of length 0 counts 0 in these two.
    """
    rows = float(total.rows.sum())
    variance = float(total.variance.sum())
    fvu = float(total.error.sum()) / variance if variance > 0 else 0.0
    frequency = density(total)
    return {
        "rows": rows,
        "fvu": fvu,
        "explained_variance": 1.0 - fvu,
        "l0": float(total.l0.sum()) / rows,
        "dead_fraction": float(np.mean(frequency == 0)),
        "dense_fraction": float(np.mean(frequency > dense_above)),
        "cosine": float(total.cosine.sum()) / rows,
        "norm_ratio": float(total.norm_ratio.sum()) / rows,
    }


def by_group(total: Totals) -> dict[str, np.ndarray]:
    """`summary`'s means for every group (position, task); NaN where a group has no rows or no variance."""
    rows, variance = np.asarray(total.rows, np.float64), np.asarray(total.variance, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        fvu = np.where(variance > 0, np.asarray(total.error, np.float64) / variance, np.nan)
        means = {name: np.asarray(getattr(total, name), np.float64) / rows for name in ("l0", "cosine", "norm_ratio")}
    return {"rows": rows, "fvu": fvu, "explained_variance": 1.0 - fvu, **means}


def density(total: Totals) -> np.ndarray:
    """Share of rows in which each latent fired."""
    return np.asarray(total.fired, np.float64) / max(1.0, float(total.rows.sum()))


def density_histogram(total: Totals, bins: int = 50, floor: float = 1e-7) -> tuple[np.ndarray, np.ndarray]:
    """Counts of latents and edges over log10 density from `floor` to 1; latents that never fired are in none."""
    frequency = density(total)
    edges = np.linspace(np.log10(floor), 0.0, bins + 1)
    counts, _ = np.histogram(np.log10(np.clip(frequency[frequency > 0], floor, 1.0)), bins=edges)
    return counts, edges


def recovered(
    logits: Callable[[Callable[[Array], Array]], Float[Array, "tokens vocab"]],
    module: AbstractDictionary,
    labels: Int[Array, " tokens"],
) -> dict[str, float]:
    """What the model loses when the site is replaced: `logits(edit)` runs it with `edit` applied to the site."""
    clean, spliced, zero = (
        jax.nn.log_softmax(logits(edit).astype(jnp.float32), axis=-1)
        for edit in (lambda a: a, lambda a: module(a).astype(a.dtype), jnp.zeros_like)
    )
    ce, ce_sae, ce_zero = (_cross_entropy(table, labels) for table in (clean, spliced, zero))
    return shares_recovered(ce, ce_sae, ce_zero, _divergence(clean, spliced), _divergence(clean, zero))


def shares_recovered(ce: float, ce_sae: float, ce_zero: float, kl_sae: float, kl_zero: float) -> dict[str, float]:
    """Cross-entropies of the model as it is, with the reconstruction and with zeros in its place, and both divergences.

    ce_recovered = (CE(zero) − CE(x̂)) / (CE(zero) − CE(x)), kl_recovered = 1 − KL(x‖x̂)/KL(x‖zero); 1 is best.
    """
    gap = ce_zero - ce
    return {
        "ce": ce,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "ce_recovered": (ce_zero - ce_sae) / gap if gap else float("nan"),
        "kl_sae": kl_sae,
        "kl_zero": kl_zero,
        "kl_recovered": 1.0 - kl_sae / kl_zero if kl_zero else float("nan"),
    }


def _cross_entropy(log_probs: Array, labels: Array) -> float:
    return float(-jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=-1)))


def _divergence(p: Array, q: Array) -> float:
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))
