"""What the rows of a store are like at each site, computed once and kept beside the shards.

STORE/statistics.safetensors and, written last, STORE/statistics.json: of which shards it is, and its digest. When shards
were added it is computed anew.
"""

from typing import NamedTuple

import numpy as np
import safetensors.numpy
from jaxtyping import Float

from sae import files, shown, storage
from sae.data.store import ActivationStore
from sae.errors import InputError

LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BINS = 64  # of norms in an octave: a quantile between the extremes is right to 2^(1/64) − 1 = 1.1 %
_LOW, _HIGH = -40, 40  # octaves
_CHUNK = 4096  # rows
_FIELDS = {"shards": str, "rows": int, "digest": str}


class Statistics(NamedTuple):
    """Of the rows of a store, at each of its manifest's sites."""

    rows: int
    mean: Float[np.ndarray, "sites d_model"]
    mean_norm: Float[np.ndarray, " sites"]
    root_mean_square: Float[np.ndarray, " sites"]  # of norms: √E‖row‖²
    quantiles: Float[np.ndarray, "sites levels"]  # of norms, at LEVELS; the extremes are exact

    def __repr__(self) -> str:
        return shown.by_field(self)


def statistics(store: ActivationStore) -> Statistics:
    """Those kept beside the store if they are of its very shards, else computed now, and kept where it can be written."""
    home = storage.place(store.directory)
    mark, data = home / "statistics.json", home / "statistics.safetensors"
    shards = files.digest("".join(shard.digest for shard in store.shards).encode())
    if (kept := _read(mark, data, shards)) is not None:
        return kept
    found = compute(store)
    tensors = {name: value for name, value in found._asdict().items() if name != "rows"}
    saved = safetensors.numpy.save(tensors)
    try:
        mark.remove()  # it is of other tensors than those that come
        data.put(saved)
        mark.put(files.dump_json({"shards": shards, "rows": found.rows, "digest": files.digest(saved)}))
    except PermissionError:
        pass  # another's store
    return found


def compute(store: ActivationStore) -> Statistics:
    """From every row, a few thousand at a time; sums in float64."""
    sites, d_model = len(store.manifest.sites), store.manifest.d_model
    total, norms, squares = np.zeros((sites, d_model)), np.zeros(sites), np.zeros(sites)
    least, most = np.full(sites, np.inf), np.zeros(sites)
    counts = np.zeros((sites, (_HIGH - _LOW) * _BINS), np.int64)
    for shard in store.shards:
        activations = shard.checked(store.manifest).activations
        for start in range(0, shard.rows, _CHUNK):
            rows = np.asarray(activations[start : start + _CHUNK]).astype(np.float64)
            square = np.square(rows).sum(-1)
            norm = np.sqrt(square)
            total, norms, squares = total + rows.sum(0), norms + norm.sum(0), squares + square.sum(0)
            least, most = np.minimum(least, norm.min(0)), np.maximum(most, norm.max(0))
            octave = np.log2(np.maximum(norm, 2.0**_LOW))
            bins = np.clip(((octave - _LOW) * _BINS).astype(np.int64), 0, counts.shape[1] - 1)
            for site in range(sites):
                counts[site] += np.bincount(bins[:, site], minlength=counts.shape[1])
    many = max(len(store), 1)
    return Statistics(
        rows=len(store),
        mean=(total / many).astype(np.float32),
        mean_norm=(norms / many).astype(np.float32),
        root_mean_square=np.sqrt(squares / many).astype(np.float32),
        quantiles=_quantiles(counts, np.where(len(store), least, 0.0), most),
    )


def _quantiles(counts: np.ndarray, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """From a histogram in octaves: the middle of the bin in which the cumulated share reaches each level."""
    edges = 2.0 ** (_LOW + (np.arange(counts.shape[1]) + 0.5) / _BINS)
    found = np.zeros((len(counts), len(LEVELS)))
    for site, each in enumerate(counts):
        reached = np.searchsorted(np.cumsum(each), np.array(LEVELS) * each.sum())
        found[site] = np.clip(edges[np.minimum(reached, len(edges) - 1)], least[site], most[site])
    found[:, 0], found[:, -1] = least, most
    return found.astype(np.float32)


def _read(mark: storage.Place, data: storage.Place, shards: str) -> Statistics | None:
    """What is kept, if it is whole and of these shards."""
    try:
        said = mark.json()
        files.check_fields(str(mark), said, _FIELDS)
        with data.on_disk() as path:
            if said["shards"] != shards or said["digest"] != files.digest_file(path):
                return None
            return Statistics(rows=said["rows"], **{n: np.array(t) for n, t in files.map_tensors(path).items()})
    except (InputError, FileNotFoundError):
        return None
