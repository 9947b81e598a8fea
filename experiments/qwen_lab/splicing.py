"""A model with a dictionary in it: its reconstruction in place of what it writes, and what the model loses."""

from collections.abc import Sequence

import equinox as eqx
from jaxtyping import Array, Float

import qwen_eqx
import sae
from qwen_lab import stopping
from qwen_lab.places import Dictionary
from sae.evaluation import metrics


def recovered(model: qwen_eqx.Qwen, dictionary: Dictionary, documents: Sequence[Sequence[int]]) -> dict[str, float]:
    """`sae.metrics.recovered` over all tokens of many documents, one at a time so that their logits never meet.

    What is made of the sites that are read, as the model computes them, replaces those that are written. `identity` is
    the largest change of any logit when it is spliced in with its error term: 0.
    """
    total: dict[str, qwen_eqx.Effect] = {}
    for tokens in documents:
        stopping.check()
        each = qwen_eqx.effects(model, tokens, _runs(model, dictionary, tokens))
        total = {name: effect + total[name] if total else effect for name, effect in each.items()}
    count = max(int(total["spliced"].predictions), 1)
    spliced, zero = total["spliced"], total["zero"]
    sums = spliced.ce, spliced.ce_edited, zero.ce_edited, spliced.kl, zero.kl
    shares = metrics.shares_recovered(*(float(value) / count for value in sums))
    return shares | {"identity": float(total["kept"].change)}


def _runs(
    model: qwen_eqx.Qwen, dictionary: Dictionary, tokens: Sequence[int]
) -> dict[str, list[qwen_eqx.AbstractEdit]]:
    """The reconstruction with its error term, the reconstruction alone, and zeros, at every site that is written."""
    acts = qwen_eqx.captured_padded(model, tokens, dictionary.place.reads)
    made = {
        site: qwen_eqx.Given(rows)
        for site, rows in dictionary.by_site(_output(dictionary.module, dictionary.read(acts))).items()
    }
    return {
        "kept": [qwen_eqx.Replace(given, error_of=given, site=site) for site, given in made.items()],
        "spliced": [qwen_eqx.Replace(given, site=site) for site, given in made.items()],
        "zero": [qwen_eqx.Ablate(site=site) for site in made],
    }


@eqx.filter_jit
def _output(module: sae.AbstractDictionary, x: Float[Array, "rows ..."]) -> Float[Array, "rows ..."]:
    return module(x)
