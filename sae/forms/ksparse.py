"""Forms that keep k latents, of each sample or of a batch on average: a sparse path, where only one product is dense."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jax import lax
from jaxtyping import Array, Float, Int

from sae.codes.products import choose, pair_dots, pair_rows
from sae.codes.select import SparseCode, batch_top_k, keep_largest
from sae.errors import InputError
from sae.forms.abstract import AbstractDictionary
from sae.forms.objective import Hyper, Objective, Selection, Taken, flat


class AbstractKSparse(AbstractDictionary):
    """A dictionary that keeps k latents; `Hyper.k` may lower its own k while it trains."""

    k: AbstractVar[int]
    exactly_k: ClassVar[bool] = False  # no sample ever fires more than k latents

    def candidates(self, per_k: int) -> int:
        """Latents of each sample that the sparse path looks at: all that can fire, or `per_k` times k."""
        return self.k if self.exactly_k else min(self.d_sae, per_k * self.k)

    @abstractmethod
    def sparse_pays(self) -> bool:
        """Whether the sparse path is the faster one for a module of this size; both give the same."""

    @abstractmethod
    def select(self, x: Float[Array, "batch ..."], hyper: Hyper, dtype: Any, candidates: int) -> Selection:
        """Which latents each sample keeps: `candidates` by one dense product in `dtype`, then the k of the rule."""

    @abstractmethod
    def sparse_loss(self, x: Float[Array, "batch ..."], y: Float[Array, "batch ..."], chosen: Selection) -> Objective:
        """`loss`, its values and gradients from the rows of the chosen latents alone."""

    def offered(
        self, x: Float[Array, "batch ..."], latents: Int[Array, " some"]
    ) -> tuple[Float[Array, "batch some"], Float[Array, "some width"]]:
        """Pre-activations of some latents, and what they write, several sites side by side: what AuxK is offered."""
        pre = jnp.einsum("bd,sd->bs", flat(self.centre(x)), flat(self.encoder[latents]))
        return pre + self.b_enc[latents][None], flat(self.decoder[latents])


class AbstractBatchTopK(AbstractKSparse):
    """A dictionary whose batch keeps k latents a sample on average while training; a threshold stands for that later."""

    threshold: AbstractVar[Float[Array, ""]]

    def sparse_pays(self) -> bool:
        """On CPU what two dense products less cost a sample, beside pairs and a selection of candidates that may overflow.

        In nanoseconds 0.08 · d_sae · width against 10 · d_sae + 0.9 · k · width: fitted to 2 cores (docs/LOG.md).
        """
        width = math.prod(self.reads)
        return jax.default_backend() != "cpu" or self.d_sae * (0.08 * width - 10) > 0.9 * self.k * width

    def with_threshold(self, rows: Float[Array, "rows ..."]) -> "AbstractBatchTopK":
        """The same with the threshold at which k latents fire on average on these rows."""
        unknown = eqx.tree_at(lambda m: m.threshold, self, unknown_threshold())
        kept = unknown.encode(rows)
        smallest = jnp.min(jnp.where(kept > 0, kept, jnp.inf))
        # just below the smallest value that is kept, for what fires has to exceed it
        below = jnp.nextafter(smallest, jnp.float32(0))
        return eqx.tree_at(lambda m: m.threshold, self, jnp.where(jnp.isfinite(smallest), below, 0.0))


def check_k(k: Any, d_sae: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
        raise InputError(f"k: found {k!r:.80}, expected a whole number from 1 to d_sae={d_sae}")
    return k


# ------------------------------------------------------------ what the forms share where the batch keeps k on average


def unknown_threshold() -> Float[Array, ""]:
    return jnp.array(-1.0, jnp.float32)


def over_threshold(
    pre: Float[Array, "*batch d_sae"], threshold: Float[Array, ""], k: int
) -> Float[Array, "*batch d_sae"]:
    """π · 1[π > threshold]; while the threshold is not known, the batch·k largest of the batch at hand."""

    def known(pre):
        return jnp.where(pre > threshold, jax.nn.relu(pre), 0.0)

    def unknown(pre):
        return batch_top_k(pre.reshape(-1, pre.shape[-1]), k).reshape(pre.shape)

    return lax.cond(threshold >= 0, known, unknown, pre)


def running_threshold(threshold: Float[Array, ""], objective: Objective, taken: Taken) -> Float[Array, ""]:
    """The running mean of the smallest value kept, from the first one on."""
    smallest = objective.smallest
    new = jnp.where(threshold < 0, smallest, taken.decay * threshold + (1 - taken.decay) * smallest)
    return jnp.where(taken.good, new, threshold)


def batch_code(pre: Float[Array, "batch d_sae"], hyper: Hyper) -> Float[Array, "batch d_sae"]:
    """The batch·k largest pre-activations where positive."""
    positive = jax.nn.relu(pre)
    return jnp.where(keep_largest(positive, jnp.round(pre.shape[0] * hyper.k).astype(jnp.int32)), positive, 0.0)


def batch_select(
    centred: Float[Array, "batch width"],
    encoder: Float[Array, "d_sae width"],
    b_enc: Float[Array, " d_sae"],
    k: tuple[int, Float[Array, ""]],
    candidates: int,
) -> Selection:
    """The pairs that a batch keeps, of `candidates` a sample; `k`: at most, and now."""
    return kept_pairs(choose(centred, encoder, b_enc, candidates), encoder.shape[0], k)


def kept_pairs(code: SparseCode, d_sae: int, k: tuple[int, Float[Array, ""]]) -> Selection:
    """The batch·k largest of the candidates of each sample, largest first; `k`: at most, and now."""
    (indices, pre), (most, now) = code, k
    batch, candidates = indices.shape
    kept = keep_largest(jax.nn.relu(pre), jnp.round(batch * now).astype(jnp.int32))
    kept = kept & (pre > 0)
    # a batch keeps no more than batch·k, so the sparse products run over no more; of each row the first ones are kept
    pairs = min(batch * most, indices.size)
    counts = jnp.sum(kept.astype(jnp.int32), axis=-1)
    # not kept[:, -1]: a slice of what top_k returns makes XLA sort whole rows
    overflow = jnp.any(counts == candidates) if candidates < d_sae else jnp.array(False)
    ends = jnp.cumsum(counts)
    place = jnp.arange(pairs, dtype=jnp.int32)
    rows = jnp.minimum(jnp.searchsorted(ends, place, side="right"), batch - 1).astype(jnp.int32)
    columns = indices[rows, jnp.clip(place - (ends - counts)[rows], 0, candidates - 1)]
    return Selection(rows, columns, place < ends[-1], overflow)


def pair_values(
    module: AbstractDictionary,
    centred: Float[Array, "batch width"],
    encoder: Float[Array, "d_sae width"],
    chosen: Selection,
) -> Float[Array, " pairs"]:
    """The values of the chosen pairs; 0 where a pair is not kept or not positive."""
    dots = pair_dots(chosen.rows, chosen.columns, lax.stop_gradient(centred), encoder)
    return jnp.where(chosen.kept, jax.nn.relu(dots + sparse_bias(module)[chosen.columns]), 0.0)


def sparse_bias(module: AbstractDictionary) -> Float[Array, " d_sae"]:
    """b_enc, with the gradient to b_dec through the encoder: Σ_j bias_bar_j · encoder_j, a vector, no sparse product."""
    if not module.apply_b_dec_to_input:
        return module.b_enc
    moved = module.b_dec - lax.stop_gradient(module.b_dec)
    return module.b_enc - jnp.einsum("sd,d->s", lax.stop_gradient(module.encoder), moved)


def pair_parts(
    widths: Sequence[int],
    chosen: Selection,
    values: Float[Array, " pairs"],
    decoder: Float[Array, "d_sae width"],
    batch: int,
) -> list[Float[Array, "batch width"]]:
    """What the latents below each width, and not below the one before, write."""
    parts, start = [], 0
    for width in widths:
        own = (
            values
            if (start, width) == (0, decoder.shape[0])
            else jnp.where((chosen.columns >= start) & (chosen.columns < width), values, 0.0)
        )
        parts.append(pair_rows(chosen.rows, chosen.columns, own, decoder, batch))
        start = width
    return parts


def fired_pairs(columns: Int[Array, " pairs"], values: Float[Array, " pairs"], d_sae: int) -> Int[Array, " d_sae"]:
    return jnp.zeros(d_sae, jnp.int32).at[columns].add((values > 0).astype(jnp.int32))
