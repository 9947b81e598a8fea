"""One pass over documents that finds what each latent fires on: density, activation histogram, best documents.

survey = Survey.take((encode(document) for document in documents), d_sae=16384)
for latent in survey.choose(100):
    documents_to_show = survey.documents(latent)
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Float, Float32, Int, Int32, Int64

from sae.errors import InputError

Codes = Float[np.ndarray | jax.Array, "_ d_sae"]  # documents differ in length
Pairs = tuple[Int[np.ndarray | jax.Array, "_ _"], Float[np.ndarray | jax.Array, "_ _"]]  # [seq, k] each

BINS_PER_DECADE = 8
CHUNK = 512  # directions whose logits are held at once
EDGES = 10.0 ** (np.arange(-3 * BINS_PER_DECADE, 4 * BINS_PER_DECADE + 1) / BINS_PER_DECADE)  # from 0.001 to 10,000


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was seen of every latent; fired means value > 0."""

    tokens: int
    fired: Int64[np.ndarray, " d_sae"]  # tokens on which the latent fired
    total: Float[np.ndarray, " d_sae"]  # sum of its values
    histogram: Int64[np.ndarray, "d_sae bins"]  # of its values where it fired, between EDGES; the outer bins are open
    best: Float32[np.ndarray, "examples d_sae"]  # its largest value in each of its best documents, falling; 0 is none
    best_documents: Int32[np.ndarray, "examples d_sae"]  # their numbers in the order given

    def __repr__(self) -> str:
        fired = f"{np.count_nonzero(self.fired):,} of {len(self.fired):,} latents fired"
        return f"Survey({self.tokens:,} tokens, {fired}, the best {len(self.best)} documents of each)"

    @classmethod
    def take(cls, codes: Iterable[Codes | Pairs], *, d_sae: int, examples: int = 8) -> "Survey":
        """Survey the latents of each document, dense [seq, d_sae] or as (indices, values) pairs."""
        tokens = 0
        fired, total = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.float64)
        histogram = np.zeros((d_sae, len(EDGES) - 1), np.int64)
        best, documents = np.zeros((examples, d_sae), np.float32), np.zeros((examples, d_sae), np.int32)
        for document, code in enumerate(codes):
            seq, latents, values = _fired(code, d_sae)
            tokens += seq
            np.add.at(fired, latents, 1)
            np.add.at(total, latents, values)
            bins = np.clip(np.searchsorted(EDGES, values, side="right") - 1, 0, len(EDGES) - 2)
            np.add.at(histogram, (latents, bins), 1)
            peaks = np.zeros(d_sae, np.float32)
            np.maximum.at(peaks, latents, values)
            better = np.flatnonzero(peaks > best[-1])  # of equal documents the first stays
            if len(better):
                values_now = np.concatenate([best[:, better], peaks[None, better]])
                numbers = np.concatenate([documents[:, better], np.full((1, len(better)), document, np.int32)])
                order = np.argsort(-values_now, axis=0, kind="stable")[:-1]
                best[:, better] = np.take_along_axis(values_now, order, 0)
                documents[:, better] = np.take_along_axis(numbers, order, 0)
        return cls(tokens, fired, total, histogram, best, documents)

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Fraction of tokens on which each latent fired."""
        return self.fired / max(self.tokens, 1)

    @property
    def mean(self) -> Float[np.ndarray, " d_sae"]:
        """Mean value of each latent where it fired; 0 if it never did."""
        return self.total / np.maximum(self.fired, 1)

    def documents(self, latent: int) -> list[int]:
        """The documents with the latent's largest values, best first."""
        return [int(document) for document in self.best_documents[self.best[:, latent] > 0, latent]]

    def choose(self, count: int) -> list[int]:
        """Latents to look at: `count` of those that fired, spread evenly over the ranks of their densities."""
        live = np.flatnonzero(self.fired)
        ranked = live[np.argsort(-self.fired[live], kind="stable")]
        places = np.unique(np.linspace(0, max(len(ranked) - 1, 0), min(count, len(ranked))).round().astype(int))
        return [int(latent) for latent in ranked[places]]


def _fired(code: Codes | Pairs, d_sae: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(tokens, latent of each firing, value of each firing)."""
    if isinstance(code, tuple):
        indices, values = np.asarray(code[0]), np.asarray(code[1], np.float32)
    else:
        values = np.asarray(code, np.float32)
        indices = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    if not np.isfinite(values).all():
        raise InputError("codes: found NaN or infinity, expected finite latents")
    on = values > 0
    latents = indices[on]
    if len(latents) and not (latents.min() >= 0 and latents.max() < d_sae):
        raise InputError(f"codes: found latent {latents.max()}, expected below d_sae={d_sae}")
    return values.shape[0], latents, values[on]


def promoted_tokens(
    directions: Float[np.ndarray | jax.Array, "latents d_model"],
    unembed: Float[np.ndarray | jax.Array, "d_model vocab"],
    count: int = 10,
) -> tuple[Int[np.ndarray, "latents count"], Float[np.ndarray, "latents count"]]:
    """The tokens whose logits rise most along each direction, and by how much: direction · unembed (the logit lens)."""
    along, table = np.asarray(directions, np.float32), np.asarray(unembed, np.float32)
    count = min(count, table.shape[1])
    ids, best = np.zeros((len(along), count), np.int64), np.zeros((len(along), count), np.float32)
    for start in range(0, len(along), CHUNK):
        logits = along[start : start + CHUNK] @ table
        least = -np.partition(-logits, count - 1, axis=1)[:, count - 1 : count]
        equal, room = logits == least, count - (logits > least).sum(axis=1, keepdims=True)
        chosen = (logits > least) | (equal & (np.cumsum(equal, axis=1) <= room))  # of equal ones the first
        part = np.nonzero(chosen)[1].reshape(len(logits), count)
        order = np.argsort(-np.take_along_axis(logits, part, 1), axis=1, kind="stable")
        ids[start : start + CHUNK] = np.take_along_axis(part, order, 1)
        best[start : start + CHUNK] = np.take_along_axis(logits, ids[start : start + CHUNK], 1)
    return ids, best


def examples(
    peaks: Float[np.ndarray, " documents"], top: int, quantiles: tuple[float, ...] = (0.75, 0.5, 0.25)
) -> list[tuple[int, str]]:
    """(document, why) of a latent whose largest value in each document is given: the `top` strongest, then quantiles.

    A quantile is of the documents where it fires, from the weakest; none is chosen twice.
    """
    firing = np.flatnonzero(peaks > 0)
    ranked = firing[np.argsort(-peaks[firing], kind="stable")]
    chosen = {int(document): f"top {place}" for place, document in enumerate(ranked[:top], 1)}
    for quantile in quantiles if len(ranked) > top else ():
        chosen.setdefault(int(ranked[round((1 - quantile) * (len(ranked) - 1))]), f"quantile {quantile:.0%}")
    return list(chosen.items())
