"""How well a linear map reads classes off rows: ridge regression on one-hot labels, its penalty chosen on training rows.

W = argmin ‖XW − Y‖² + λ‖W‖² on centred and scaled rows (Hoerl and Kennard 1970); λ is the one of PENALTIES whose
leave-one-out predictions are right most often, ŷ_i = (Ŷ_i − h_ii Y_i) / (1 − h_ii) with H = X(XᵀX + λ)⁻¹Xᵀ.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from sae.errors import InputError

PENALTIES = 10.0 ** np.arange(-1, 6)


class Rows(NamedTuple):
    """Rows with the class of each, from 0 on."""

    x: Float[np.ndarray, "rows width"]
    labels: Int[np.ndarray, " rows"]


class Accuracy(NamedTuple):
    """On the rows that measure."""

    probe: float
    shuffled: float  # of a probe trained on the same rows with their labels permuted, mean of several
    commonest: float  # of always saying the class that is commonest in training


def accuracy(training: Rows, measuring: Rows, *, seed: int = 0, shuffles: int = 5) -> Accuracy:
    """The share of `measuring` whose class the probe of `training` says, beside controls."""
    classes = int(max(training.labels.max(initial=0), measuring.labels.max(initial=0))) + 1
    if len(training.x) < 2 or not len(measuring.x) or min(training.labels.min(), measuring.labels.min()) < 0:
        found = f"{len(training.x)} and {len(measuring.x)} rows"
        raise InputError(f"probe: found {found}, expected two to train on, one to measure, and labels from 0")
    mean, spread = training.x.mean(axis=0, dtype=np.float64), training.x.std(axis=0, dtype=np.float64)
    scale = np.where(spread > 0, spread, 1.0)
    x, other = (training.x - mean) / scale, (measuring.x - mean) / scale
    left, values, right = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    along = other.astype(np.float64) @ right.T

    def share(labels: np.ndarray) -> float:
        said = _said(left, values, along, np.eye(classes)[labels])
        return float(np.mean(said == measuring.labels))

    rng = np.random.default_rng(seed)
    drawn = [share(rng.permutation(training.labels)) for _ in range(shuffles)]
    commonest = np.bincount(training.labels, minlength=classes).argmax()
    return Accuracy(share(training.labels), float(np.mean(drawn)), float(np.mean(measuring.labels == commonest)))


def _said(
    left: Float64[np.ndarray, "rows rank"],
    values: Float64[np.ndarray, " rank"],
    along: Float64[np.ndarray, "others rank"],
    y: Float64[np.ndarray, "rows classes"],
) -> Int[np.ndarray, " others"]:
    """The class of other rows, `along` the right singular vectors of the training rows X = left · values · right."""
    mean = y.mean(axis=0)
    target, truth = left.T @ (y - mean), y.argmax(axis=1)
    scores = []
    for penalty in PENALTIES:
        shrunk = values**2 / (values**2 + penalty)
        own = np.minimum((left**2) @ shrunk + 1 / len(left), 1 - 1e-9)[:, None]  # the mean is fitted too
        fitted = mean + left @ (shrunk[:, None] * target)
        without = (fitted - own * y) / (1 - own)
        scores.append(np.mean(without.argmax(axis=1) == truth))
    best = len(scores) - 1 - int(np.argmax(scores[::-1]))  # of equals the strongest penalty
    weights = (values / (values**2 + PENALTIES[best]))[:, None] * target
    return (mean + along @ weights).argmax(axis=1)
