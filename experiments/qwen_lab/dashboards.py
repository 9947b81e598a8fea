"""Latents as the JSON that SAEDashboard 0.8.0 writes for Neuronpedia: `batch-N.json`, which Neuronpedia's import reads.

The fields are those of `NeuronpediaDashboardBatch` (sae_dashboard/neuronpedia/neuronpedia_dashboard.py), filled as
`neuronpedia_converter.py` fills them. What correlates with a latent is not computed: these lists are empty.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Float

import qwen_eqx
import sae
from qwen_lab import files, lens
from qwen_lab.evaluation import Data
from qwen_lab.places import Dictionary

PER_FILE = 64  # latents
BINS = 50  # of a histogram
TOKENS = 10  # promoted, and suppressed
ALIGNED = 3  # dimensions that a latent writes most
INTERVALS = 5  # between 0 and the largest value, an example of each
WINDOW = 128  # tokens of an example


def write(directory: Path, dictionary: Dictionary, data: Data, examples: int = 4) -> list[Path]:
    """Every latent that fires on these documents, `PER_FILE` to a file; each with its `examples` best documents."""
    module = dictionary.module
    codes = [scipy.sparse.csc_array(sae.encoded(module, rows)) for rows in data.rows(dictionary)]
    fired = np.flatnonzero(sum(np.diff(code.indptr) for code in codes))
    pieces = [document.pieces() for document in data.documents]
    files.fresh_directory(directory)
    paths = []
    for number, start in enumerate(range(0, len(fired), PER_FILE)):
        chosen = fired[start : start + PER_FILE]
        *_, rows = dictionary.by_site(module.decoder[jnp.asarray(chosen, jnp.int32)]).values()
        decoder = np.asarray(rows, np.float32)
        raised = lens.effects(data.model, decoder)
        common = {
            "n_prompts_total": len(codes),
            "n_tokens_in_prompt": max(map(len, pieces), default=0),
            "dataset": "documents of ARC tasks",
        }
        features = [
            feature(latent, [code[:, [latent]].toarray()[:, 0] for code in codes], pieces, decoder[at], examples)
            | _logits(None if raised is None else raised[at], data.tokenizer)
            | common
            for at, latent in enumerate(chosen.tolist())
        ]
        paths.append(directory / f"batch-{number}.json")
        files.write_json(paths[-1], described(dictionary, data.model_name, features))
    return paths


def described(dictionary: Dictionary, model: str, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A `NeuronpediaDashboardBatch`; its layer is that of the last site that is written."""
    site = qwen_eqx.Site.spelled(dictionary.place.writes[-1])
    named = {
        "model_id": model,
        "layer": 0 if site is None else site.layer,
        "sae_set": dictionary.name,
        "sae_id_suffix": None,
    }
    return named | {"features": list(features)}


def feature(
    latent: int,
    values: Sequence[Float[np.ndarray, " _"]],
    pieces: Sequence[Sequence[str]],
    decoder: Float[np.ndarray, " d_model"],
    examples: int = 4,
) -> dict[str, Any]:
    """A `NeuronpediaDashboardFeature` but for its logits; `values` are the latent's in each document."""
    every = np.concatenate([np.asarray(each, np.float64) for each in values])
    heights, middles = histogram(every[every > 0])
    size = np.abs(decoder.astype(np.float64))
    aligned = np.argsort(-size, kind="stable")[:ALIGNED]
    return {
        "feature_index": latent,
        "neuron_alignment_indices": aligned.tolist(),
        "neuron_alignment_values": _rounded(decoder[aligned]),
        "neuron_alignment_l1": _rounded(size[aligned] / (size.sum() or 1.0)),
        **{f"correlated_neurons_{name}": [] for name in ("indices", "pearson", "l1")},
        **{f"correlated_features_{name}": [] for name in ("indices", "pearson", "l1")},
        "frac_nonzero": float(np.mean(every > 0)) if len(every) else 0.0,
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": middles,
        "decoder_weights_dist": [],
        "activations": _activations(values, pieces, examples),
        "vector": [],
    }


def histogram(values: Float[np.ndarray, " values"]) -> tuple[list[int], list[float]]:
    """How many values lie in each of `BINS` equal parts of their range, and the middle of each."""
    if not len(values):
        return [], []
    counts, edges = np.histogram(values, BINS)
    return counts.tolist(), [round(float(each), 5) for each in (edges[:-1] + edges[1:]) / 2]


def _activations(
    values: Sequence[Float[np.ndarray, " _"]], pieces: Sequence[Sequence[str]], examples: int
) -> list[dict[str, Any]]:
    """The best documents, then a place in each part of the range from 0 to the peak, strongest part first."""
    peaks = np.asarray([np.max(each, initial=0.0) for each in values])
    peak, tokens = float(peaks.max(initial=0.0)), sum(map(len, values))
    best: list[int] = [n for n in np.argsort(-peaks, kind="stable")[:examples].tolist() if peaks[n] > 0]
    found = [_window(values[n], pieces[n], int(np.argmax(values[n])), (-1.0, peak, -1.0)) for n in best]
    bounds = np.linspace(0, peak, INTERVALS + 1)
    for low, high in zip(bounds[-2::-1], bounds[:0:-1], strict=True):
        inside = [np.flatnonzero((each > 0) & (each >= low) & (each <= high)) for each in values]
        first = next((number for number, places in enumerate(inside) if len(places)), None)
        if first is not None:
            share = sum(map(len, inside)) / max(1, tokens)
            place = int(inside[first][len(inside[first]) // 2])
            found.append(_window(values[first], pieces[first], place, (float(low), float(high), share)))
    return found


def _window(
    values: Float[np.ndarray, " seq"], pieces: Sequence[str], place: int, interval: tuple[float, float, float]
) -> dict[str, Any]:
    """A `NeuronpediaDashboardActivation`: at most `WINDOW` tokens around one place."""
    start = max(0, min(place - WINDOW // 2, len(pieces) - WINDOW))
    low, high, share = interval
    return {
        "bin_min": round(low, 3),
        "bin_max": round(high, 3),
        "bin_contains": round(share, 5),
        "tokens": list(pieces[start : start + WINDOW]),
        "values": _rounded(values[start : start + WINDOW]),
        "qualifying_token_index": place - start,
    }


def _logits(effects: Float[np.ndarray, " vocab"] | None, tokenizer: qwen_eqx.Tokenizer) -> dict[str, Any]:
    names = (
        "pos_str",
        "pos_values",
        "neg_str",
        "neg_values",
        "logits_hist_data_bar_heights",
        "logits_hist_data_bar_values",
    )
    if effects is None:
        return {name: [] for name in names}
    told: list[Any] = []
    for order in (np.argsort(-effects, kind="stable")[:TOKENS], np.argsort(effects, kind="stable")[:TOKENS]):
        told += [[lens.token_text(tokenizer, token) for token in order.tolist()], _rounded(effects[order])]
    return dict(zip(names, [*told, *histogram(effects.astype(np.float64))], strict=True))


def _rounded(values: Float[np.ndarray, " values"]) -> list[float]:
    return [round(float(value), 3) for value in values]
