"""Which latent fires where a plain property holds: F1 of every pair, with a threshold chosen on other rows."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.errors import InputError

CUTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)  # of a latent's largest value: it counts as firing above


class Rows(NamedTuple):
    """Latents and properties of the same rows."""

    codes: Float[np.ndarray, "rows latents"]
    labels: Bool[np.ndarray, "rows properties"]


class Matches(NamedTuple):
    """Of every latent and property; the cut is the best of CUTS on the rows that chose."""

    f1: Float[np.ndarray, "latents properties"]
    cut: Float[np.ndarray, "latents properties"]  # a value of the latent
    density: Float[np.ndarray, " latents"]  # share of rows on which it fires at all


def match(choosing: Iterable[Rows], measuring: Iterable[Rows]) -> Matches:
    """F1 = 2 TP / (fired + labelled) on `measuring`, at the cut that is best on `choosing`, other documents.

    A latent that never fires on the rows that chose, or a property that never holds, has F1 0.
    """
    chosen = list(choosing)
    if not chosen:
        raise InputError("choosing: found no rows, expected some")
    largest = np.max([rows.codes.max(axis=0, initial=0.0) for rows in chosen], axis=0)
    cuts = np.asarray(CUTS, np.float32)[:, None] * largest[None, :].astype(np.float32)
    scores = _f1(*_counts(chosen, cuts))
    best = scores.argmax(axis=0)
    right, fired, held, fires, rows = _counts(measuring, cuts)
    f1 = np.take_along_axis(_f1(right, fired, held, fires, rows), best[None], axis=0)[0]
    return Matches(f1, np.take_along_axis(cuts[:, :, None], best[None], axis=0)[0], fires / max(1, rows))


def _counts(
    parts: Iterable[Rows], cuts: Float[np.ndarray, "cuts latents"]
) -> tuple[
    Float[np.ndarray, "cuts latents properties"],
    Float[np.ndarray, "cuts latents"],
    Float[np.ndarray, " properties"],
    Float[np.ndarray, " latents"],
    int,
]:
    """Rows where a latent fires and a property holds; where it fires; where it holds; where it fires at all; all."""
    right, fired, held, fires, rows = 0.0, 0.0, 0.0, 0.0, 0
    for codes, labels in parts:
        over = (codes[None] > cuts[:, None]).astype(np.float32)
        right += np.einsum("cnl,np->clp", over, labels.astype(np.float32), optimize=True)
        fired, held = fired + over.sum(axis=1), held + labels.sum(axis=0, dtype=np.float32)
        fires, rows = fires + (codes > 0).sum(axis=0, dtype=np.float32), rows + len(codes)
    if not rows:
        raise InputError("rows: found none, expected some")
    return np.asarray(right), np.asarray(fired), np.asarray(held), np.asarray(fires), rows


def _f1(right, fired, held, fires, rows) -> Float[np.ndarray, "cuts latents properties"]:
    total = fired[:, :, None] + held[None, None, :]
    return 2 * right / np.where(total > 0, total, 1)


def strongest(f1: Float[np.ndarray, "latents properties"], count: int) -> Int[np.ndarray, "pairs 2"]:
    """The `count` best (latent, property), no latent and no property twice."""
    left, found = f1.copy(), []
    for _ in range(min(count, *f1.shape)):
        latent, name = np.unravel_index(left.argmax(), left.shape)
        found.append((int(latent), int(name)))
        left[latent, :], left[:, name] = -1, -1
    return np.asarray(found, np.int64).reshape(-1, 2)
