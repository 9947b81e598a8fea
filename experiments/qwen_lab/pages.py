"""Feature pages: what each latent of a dictionary fires on, painted on the grids of documents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import qwen_eqx
import sae
from qwen_lab import figures
from qwen_lab.corpus import Document
from qwen_lab.evaluation import Data
from qwen_lab.places import Dictionary


def write_page(
    path: str | Path,
    dictionary: Dictionary,
    data: Data,
    *,
    latents: int = 40,
    examples: int = 4,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """One HTML file of `latents` latents over all densities, `examples` documents each; `scores` are of `evaluate`."""
    module, rows = dictionary.module, data.rows(dictionary)
    survey = sae.Survey.take((sae.encoded(module, x) for x in rows), d_sae=module.d_sae, examples=examples)
    chosen = survey.choose(latents)
    codes = [sae.encoded(module, x)[:, chosen] for x in rows]  # again: of all latents they may not fit
    facts = {
        "model": data.model_name,
        "site": str(dictionary.place),
        "SAE": f"{module.name}, {module.d_sae:,} latents, {dictionary.name}",
        "documents": f"{len(data.documents)} of {len(data.tasks)} tasks, {survey.tokens:,} tokens",
        **figures.written(scores or {}),
    }
    shown = _latents(dictionary, survey, data, chosen, codes)
    sae.report.write(path, f"Latents of {dictionary.name}", shown, facts=facts, density=survey.density)


def _latents(
    dictionary: Dictionary,
    survey: sae.Survey,
    data: Data,
    chosen: Sequence[int],
    codes: Sequence[Float[np.ndarray, "_ chosen"]],
) -> list[sae.report.Latent]:
    """The pages of the chosen latents, whose values `codes` holds.

    Promoted tokens are the logit lens' through the final norm's gain, at the last site that is written; there are none
    where that does not have the residual stream's width.
    """
    lens = lens_of(data.model)
    *_, directions = dictionary.by_site(dictionary.module.decoder[jnp.asarray(chosen, jnp.int32)]).values()
    promoted = suppressed = [[] for _ in chosen]
    if directions.shape[1] == lens.shape[0]:
        promoted, suppressed = (
            tokens_along(directions, lens, data.tokenizer),
            tokens_along(-directions, lens, data.tokenizer),
        )
    return [
        sae.report.Latent(
            index=latent,
            density=float(survey.density[latent]),
            mean=float(survey.mean[latent]),
            histogram=survey.histogram[latent],
            examples=[example_of(data.documents[number], codes[number][:, at]) for number in survey.documents(latent)],
            promoted=promoted[at],
            suppressed=[(token, -logit) for token, logit in suppressed[at]],
        )
        for at, latent in enumerate(chosen)
    ]


def lens_of(model: qwen_eqx.Qwen) -> Float[jax.Array, "d_model vocab"]:
    """The unembedding with the final norm's gain, in float32 as logits are."""
    head = model.embed.table if model.head is None else model.head.weight
    return (head.astype(jnp.float32) * model.norm.weight.astype(jnp.float32)[None]).T


def tokens_along(
    directions: Float[jax.Array, "chosen d_model"],
    lens: Float[jax.Array, "d_model vocab"],
    tokenizer: qwen_eqx.Tokenizer,
) -> list[list[tuple[str, float]]]:
    """The tokens that each direction promotes most, with their logits."""
    ids, logits = sae.promoted_tokens(directions, lens)
    return [
        [(tokenizer.decode([token]), float(logit)) for token, logit in zip(row, values, strict=True)]
        for row, values in zip(ids, logits, strict=True)
    ]


def example_of(document: Document, values: Float[np.ndarray, " seq"]) -> sae.report.Example:
    """A document, with those grids on which the latent fired somewhere (else the test input)."""
    painted = document.painted(values)
    shown = [grid for grid in painted if grid.activations.max() > 0][:6] or painted[-2:-1]
    return sae.report.Example(f"task {document.task}, test {document.test}", document.pieces(), values, shown)
