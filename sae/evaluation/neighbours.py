"""Latents beside one another: whose decoder rows point the same way, and which fire at the same positions."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

CHUNK = 1024  # latents compared with all others at once
PRODUCTS = 2 * 10**8  # pairs of latents that fire together, counted at most; else positions are thinned evenly


def nearest(
    directions: Float[np.ndarray, "latents width"], count: int
) -> tuple[Int[np.ndarray, "latents count"], Float[np.ndarray, "latents count"]]:
    """The `count` other rows of largest cosine, and their cosines: d_i · d_j / (|d_i| |d_j|); a row of zeros has none."""
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = np.asarray(directions / np.where(norms > 0, norms, 1), np.float32)
    count = min(count, len(unit) - 1)
    places, values = np.zeros((len(unit), count), np.int64), np.zeros((len(unit), count), np.float32)
    for start in range(0, len(unit), CHUNK):
        cosines = unit[start : start + CHUNK] @ unit.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -2  # itself comes last
        best = np.argpartition(-cosines, max(count - 1, 0), axis=1)[:, :count]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(cosines, best, 1), axis=1, kind="stable"), 1)
        places[start : start + CHUNK], values[start : start + CHUNK] = best, np.take_along_axis(cosines, best, 1)
    return places, values


def together(codes: Sequence[scipy.sparse.csr_array], count: int) -> tuple[list[list[tuple[int, float]]], int]:
    """Of each latent the `count` that fire most at its positions, and at how many positions that was counted.

    How much is Jaccard's share: positions where both fire over those where either does. Codes are [seq, d_sae] of each
    document. Where latents fire densely only every n-th position is counted.
    """
    fires = scipy.sparse.csr_array(scipy.sparse.vstack(list(codes)))
    fires.data = (fires.data > 0).astype(np.float32)
    fires.eliminate_zeros()
    cost = int((np.diff(fires.indptr).astype(np.int64) ** 2).sum())
    fires = fires[:: -(-cost // PRODUCTS) or 1]
    alone = np.bincount(fires.indices, minlength=int(fires.shape[1]))
    found: list[list[tuple[int, float]]] = []
    by_latent = scipy.sparse.csr_array(fires.T)
    for start in range(0, len(alone), CHUNK):
        both = scipy.sparse.csr_array(by_latent[start : start + CHUNK] @ fires)
        indices, data, ends = np.asarray(both.indices), np.asarray(both.data), np.asarray(both.indptr)
        for row in range(min(CHUNK, len(alone) - start)):
            held = slice(ends[row], ends[row + 1])
            others, hits = indices[held], data[held]
            kept = others != start + row
            others, hits = others[kept], hits[kept]
            shares = hits / (alone[start + row] + alone[others] - hits)
            order = np.lexsort((others, -shares))[:count]
            found.append(list(zip(others[order].tolist(), shares[order].tolist(), strict=True)))
    return found, len(fires.indptr) - 1
