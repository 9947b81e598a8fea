"""The gallery of a graph's features: what each fires on in other documents."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

import qwen_eqx
import sae
from qwen_lab import lens, pages
from qwen_lab.circuits.graph import Graph
from qwen_lab.circuits.nodes import FEATURE
from qwen_lab.corpus import Document
from sae import gallery
from sae.evaluation import survey

ADDRESS = "features/index.html#/{layer}/{latent}"  # beside the graph's own page
EXAMPLES = 4
ELSEWHERE = "It is not computed for a graph's features: evaluate_sae.py does."
NOTES: dict[str, str] = dict.fromkeys(("matches", "near", "together", "invariance", "steered"), ELSEWHERE)


def write(
    directory: Path,
    graph: Graph,
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    transcoders: sae.Transcoders,
    documents: Sequence[Document],
) -> None:
    """features/ with the features of every layer of which the graph has some; the graph should be pruned."""
    nodes = graph.nodes
    layers = np.unique(nodes.layer[nodes.kind == FEATURE]).tolist()
    chosen = {n: np.unique(nodes.index[(nodes.kind == FEATURE) & (nodes.layer == n)]) for n in layers}
    codes = _codes(model, transcoders, documents, chosen)
    table = lens.lens_of(model)
    shown = []
    for layer, latents in chosen.items():
        directions = jnp.asarray(transcoders.decoder_rows(layer, latents)[:, 0])
        up, down = (lens.tokens_along(sign * directions, table, tokenizer) for sign in (1, -1))
        down = [[(token, -logit) for token, logit in row] for row in down]
        made = _latents(latents, codes[layer], up, down)
        shown.append(gallery.Dictionary(str(layer), f"transcoder of block {layer}", str(layer), made, notes=NOTES))
    facts = {"graph": str(graph.facts.get("what", "")), "documents": str(len(documents))}
    held = [pages.document_of(document, tokenizer) for document in documents]
    gallery.write(directory / "features", "Features of a graph", shown, held, facts=facts)


def _latents(
    latents: Int[np.ndarray, " chosen"],
    codes: Sequence[Float[np.ndarray, "seq chosen"]],
    up: Sequence[Sequence[tuple[str, float]]],
    down: Sequence[Sequence[tuple[str, float]]],
) -> list[gallery.Latent]:
    found = sae.Survey.take(codes, d_sae=len(latents), examples=1)
    peaks = np.stack([code.max(axis=0) for code in codes])
    return [
        gallery.Latent(
            index=latent,
            density=float(found.density[at]),
            mean=float(found.mean[at]),
            peak=float(peaks[:, at].max()),
            histogram=found.histogram[at],
            examples=[
                gallery.Example(
                    why, gallery.Fired(n, fires := np.flatnonzero(codes[n][:, at] > 0), codes[n][fires, at])
                )
                for n, why in survey.examples(peaks[:, at], EXAMPLES)
            ],
            promoted=up[at],
            suppressed=down[at],
        )
        for at, latent in enumerate(latents.tolist())
    ]


def _codes(
    model: qwen_eqx.Qwen,
    transcoders: sae.Transcoders,
    documents: Sequence[Document],
    chosen: Mapping[int, Int[np.ndarray, " chosen"]],
) -> dict[int, list[Float[np.ndarray, "seq chosen"]]]:
    """Layer -> of each document the chosen latents: all of them would not fit."""
    sites = {layer: f"blocks.{layer}.{transcoders.input_site}" for layer in chosen}
    codes: dict[int, list[np.ndarray]] = {layer: [] for layer in chosen}
    for document in documents:
        acts = qwen_eqx.captured_padded(model, document.tokens, list(sites.values()))
        for layer, read in sites.items():
            z = np.asarray(transcoders.encode(layer, acts[read]))
            codes[layer].append(z[: len(document.tokens), chosen[layer]])
    return codes
