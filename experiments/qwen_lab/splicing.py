"""A model with a dictionary in it: its reconstruction in place of what it writes, and what the model loses."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

import qwen_eqx
import sae
from qwen_eqx.text.ids import bucket
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
    return _shares(total["spliced"], total["zero"]) | {"identity": float(total["kept"].change)}


def _shares(spliced: qwen_eqx.Effect, zero: qwen_eqx.Effect) -> dict[str, float]:
    """Of sums over documents, a prediction each."""
    count = max(int(spliced.predictions), 1)
    sums = spliced.ce, spliced.ce_edited, zero.ce_edited, spliced.kl, zero.kl
    return metrics.shares_recovered(*(float(value) / count for value in sums))


def replaced(
    model: qwen_eqx.Qwen, dictionaries: Sequence[Dictionary], documents: Sequence[Sequence[int]]
) -> dict[str, float]:
    """As `recovered`, with all of these dictionaries in at once, each reading what the ones before it have left.

    So transcoders of all MLPs are the model's MLPs: what is lost at one is read by the next. A pass for each site.
    """
    total: dict[str, qwen_eqx.Effect] = {}
    for tokens in documents:
        stopping.check()
        made = _in_turn(model, dictionaries, tokens)
        runs: dict[str, list[qwen_eqx.AbstractEdit]] = {
            "spliced": [qwen_eqx.Replace(given, site=site) for site, given in made.items()],
            "zero": [qwen_eqx.Ablate(site=site) for site in made],
        }
        each = qwen_eqx.effects(model, tokens, runs)
        total = {name: effect + total[name] if total else effect for name, effect in each.items()}
    return _shares(total["spliced"], total["zero"])


def _in_turn(
    model: qwen_eqx.Qwen, dictionaries: Sequence[Dictionary], tokens: Sequence[int]
) -> dict[str, qwen_eqx.Given]:
    """What stands at each site that is written, in the order in which the model computes them."""
    turns = sorted(
        (qwen_eqx.Site.parse(site, model.config), site, each) for each in dictionaries for site in each.place.writes
    )
    reads = list(dict.fromkeys(site for each in dictionaries for site in each.place.reads))
    room = bucket(len(tokens))
    blank = qwen_eqx.Given(jnp.zeros((room, model.config.d_model), jnp.float32))
    made = {site: blank for _, site, _ in turns}  # a later site's value is not read yet
    for _, site, dictionary in turns:
        edits = [qwen_eqx.Replace(given, site=name) for name, given in made.items()]
        acts = model.run_with_capture(tokens, reads, edits=edits, logits=None)[1]
        padded = {name: jnp.pad(rows, ((0, room - len(tokens)), (0, 0))) for name, rows in acts.items()}
        rows = _output(dictionary.module, dictionary.read(padded))
        made[site] = qwen_eqx.Given(dictionary.by_site(rows)[site])
    return made


def replacing(config: qwen_eqx.QwenConfig, dictionaries: Sequence[Dictionary]) -> dict[str, list[Dictionary]]:
    """Those of these that write the outputs of all MLPs: each that does so alone, and single ones that do together."""
    mlps = {qwen_eqx.Site(layer, "mlp_out") for layer in range(config.layers)}
    alone, together = {}, []
    for each in dictionaries:
        sites = [qwen_eqx.Site.parse(site, config) for site in each.place.writes]
        if each.place.transcodes and set(sites) == mlps:
            alone[each.name] = [each]
        elif each.place.transcodes and set(sites) < mlps:
            together.append((each, sites))
    written = [site for _, sites in together for site in sites]
    whole = set(written) == mlps and len(written) == len(mlps)
    return alone | ({"all": [each for each, _ in together]} if whole else {})


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
