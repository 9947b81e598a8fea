"""How much of what a latent does stays when the task is turned, recoloured or told in another order."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

import arc
import sae
from qwen_lab.corpus import Document, PlacedGrid
from qwen_lab.evaluation import Data
from qwen_lab.places import Dictionary

KINDS = ("turned", "recoloured", "reordered")


@dataclasses.dataclass(frozen=True)
class Twin:
    """A document's task, augmented in one way and asked again."""

    kind: str
    original: int
    augmentation: arc.Augmentation
    document: Document


def twins(data: Data, count: int, seed: int) -> list[Twin]:
    """One of each kind for the first `count` documents, where they fit; drawn from the seed and the document's number."""
    found = []
    for number, document in enumerate(data.documents[:count]):
        rng = np.random.default_rng([seed, number])
        for kind, augmentation in _drawn(rng, document.pairs).items():
            twin = document.turned(augmentation, data.tokenizer)
            if twin is not None:
                found.append(Twin(kind, number, augmentation, twin))
    return found


def _drawn(rng: np.random.Generator, pairs: int) -> dict[str, arc.Augmentation]:
    """None of them the identity; a single pair has no other order."""
    symmetries = [name for name in arc.augment.SYMMETRIES if name != "identity"]
    drawn = {
        "turned": arc.Augmentation(symmetries[rng.integers(len(symmetries))]),
        "recoloured": arc.augment.sample(rng, symmetries=False),
    }
    if pairs > 1:
        order = tuple(int(at) for at in np.roll(np.arange(pairs), rng.integers(1, pairs)))
        drawn["reordered"] = arc.Augmentation(order=order)
    return drawn


def correlations(
    dictionary: Dictionary, data: Data, twins: Sequence[Twin], read: Data
) -> tuple[dict[str, Float[np.ndarray, " d_sae"]], int]:
    """Kind -> Pearson's r of each latent's value on a cell and on the same cell of the twin; and how many cells that is of.

    A cell's value is the largest of its tokens'. NaN where a latent is the same on all cells, as one that is silent is.
    `read` holds the documents of `twins`, as the model read them.
    """
    d_sae = dictionary.module.d_sae
    sums = {kind: np.zeros((5, d_sae)) for kind in dict.fromkeys(twin.kind for twin in twins)}
    counts = dict.fromkeys(sums, 0)
    codes: dict[int, np.ndarray] = {}
    for twin, acts in zip(twins, read.acts, strict=True):
        if twin.original not in codes:
            codes = {twin.original: sae.encoded(dictionary.module, dictionary.read(data.acts[twin.original]))}
        other = sae.encoded(dictionary.module, dictionary.read(acts))
        for x, y in _matched(twin, data.documents[twin.original], codes[twin.original], other):
            x, y = x.astype(np.float64), y.astype(np.float64)
            sums[twin.kind] += [x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)]
            counts[twin.kind] += len(x)
    return {kind: _pearson(total, counts[kind]) for kind, total in sums.items()}, sum(counts.values())


def _pearson(sums: Float[np.ndarray, "5 d_sae"], count: int) -> Float[np.ndarray, " d_sae"]:
    x, y, xx, yy, xy = sums
    spread = (count * xx - x * x) * (count * yy - y * y)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (count * xy - x * y) / np.sqrt(spread)
    return np.where(spread > 1e-12 * (count * xx * count * yy), np.clip(r, -1, 1), np.nan)


def _matched(
    twin: Twin, document: Document, here: np.ndarray, there: np.ndarray
) -> Iterator[tuple[Float[np.ndarray, "cells d_sae"], Float[np.ndarray, "cells d_sae"]]]:
    """Values on the cells of each grid that both documents hold, the twin's cells in the order of the original's."""
    order = twin.augmentation.order or tuple(range(document.pairs))
    of_twin = {
        (order[grid.pair] if grid.pair < document.pairs else grid.pair, grid.title): grid
        for grid in twin.document.grids
    }
    for grid in document.grids:
        other = of_twin.get((grid.pair, grid.title))
        if other is not None:
            mine = twin.augmentation.turn(_on_cells(document, grid, here))
            yield mine.reshape(-1, mine.shape[-1]), _on_cells(twin.document, other, there).reshape(-1, mine.shape[-1])


def _on_cells(document: Document, grid: PlacedGrid, codes: np.ndarray) -> Float[np.ndarray, "rows cols d_sae"]:
    first, end = np.moveaxis(document.tokens_of(grid), -1, 0)
    values = codes[first]
    for more in range(1, int((end - first).max(initial=1))):
        at = np.minimum(first + more, len(codes) - 1)
        values = np.maximum(values, np.where((first + more < end)[..., None], codes[at], 0))
    return values
