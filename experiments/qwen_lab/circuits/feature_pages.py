"""Pages of a graph's features: what each fires on in other documents, one file for each layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

import qwen_eqx
import sae
from qwen_lab import pages
from qwen_lab.circuits.graph import Graph
from qwen_lab.circuits.nodes import FEATURE
from qwen_lab.corpus import Document

ADDRESS = "features_{layer}.html#latent-{latent}"  # beside the graph's own page
EXAMPLES = 4


def write(
    directory: Path,
    graph: Graph,
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    transcoders: sae.Transcoders,
    documents: Sequence[Document],
) -> None:
    """features_L.html for every layer of which the graph has a feature; the graph should be pruned."""
    nodes, lens = graph.nodes, pages.lens_of(model)
    layers = np.unique(nodes.layer[nodes.kind == FEATURE]).tolist()
    chosen = {n: np.unique(nodes.index[(nodes.kind == FEATURE) & (nodes.layer == n)]) for n in layers}
    codes = _codes(model, transcoders, documents, chosen)
    for layer, latents in chosen.items():
        survey = sae.Survey.take(codes[layer], d_sae=len(latents), examples=EXAMPLES)
        directions = jnp.asarray(transcoders.decoder_rows(layer, latents)[:, 0])
        promoted, suppressed = (pages.tokens_along(sign * directions, lens, tokenizer) for sign in (1, -1))
        shown = [
            sae.report.Latent(
                index=latent,
                density=float(survey.density[at]),
                mean=float(survey.mean[at]),
                histogram=survey.histogram[at],
                examples=[pages.example_of(documents[n], codes[layer][n][:, at]) for n in survey.documents(at)],
                promoted=promoted[at],
                suppressed=[(token, -logit) for token, logit in suppressed[at]],
            )
            for at, latent in enumerate(latents.tolist())
        ]
        facts = {"graph": str(graph.facts.get("what", "")), "documents": f"{len(documents)}, {survey.tokens:,} tokens"}
        path = directory / ADDRESS.partition("#")[0].format(layer=layer)
        sae.report.write(path, f"Features of layer {layer}", shown, facts=facts)


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
        for layer, site in sites.items():
            z = np.asarray(transcoders.encode(layer, acts[site]))
            codes[layer].append(z[: len(document.tokens), chosen[layer]])
    return codes
