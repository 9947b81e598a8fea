"""How good a dictionary is on documents: what it reconstructs, where, and what a model with it in loses."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import qwen_eqx
import sae
from qwen_lab import sources, splicing
from qwen_lab.corpus import Document
from qwen_lab.places import Dictionary, Place
from sae.evaluation import metrics
from sae.forms.losses import fvu

POSITIONS = (0, 1, 4, 16, 64, 256, 1024, 4096)  # where each group of positions starts
Groups = dict[str, dict[str, dict[str, float]]]
"""What they are grouped by -> group -> metric."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What dictionaries are measured on: documents, and what the model computes at every site while it reads them."""

    model: qwen_eqx.Qwen
    tokenizer: qwen_eqx.Tokenizer
    model_name: str
    documents: list[Document]
    acts: list[dict[str, jax.Array]]

    @classmethod
    def read(
        cls,
        model: qwen_eqx.Qwen,
        tokenizer: qwen_eqx.Tokenizer,
        documents: Iterable[Document],
        places: Iterable[Place],
        model_name: str = "",
    ) -> "Data":
        """The model reads each document once, for all places."""
        sites = [site for place in places for site in place.sites]
        kept, acts = [], []
        for document in documents:
            kept.append(document)
            acts.append(qwen_eqx.captured(model, document.tokens, sites))
        return cls(model, tokenizer, model_name, kept, acts)

    def rows(self, dictionary: Dictionary) -> list[Float[Array, "seq ..."]]:
        """The rows of each document that a dictionary reads."""
        return [dictionary.read(acts) for acts in self.acts]

    @property
    def tasks(self) -> list[str]:
        """The tasks of the documents, each once."""
        return list(dict.fromkeys(document.task for document in self.documents))


def evaluate(dictionary: Dictionary, data: Data, sink_times: float = 10.0) -> dict[str, Any]:
    """All metrics of one dictionary, also by position and by task; `docs/sae.md` says what each is.

    Positions whose norm exceeds `sink_times` medians are left out of the reconstruction; 0 keeps all.
    """
    module, place = dictionary.module, dictionary.place
    total, groups = reconstruct(dictionary, data, sink_times)
    counts, edges = metrics.density_histogram(total)
    return {
        "form": module.name,
        "site": str(place),
        "d_sae": module.d_sae,
        **metrics.summary(total),
        **splicing.recovered(data.model, dictionary, [document.tokens for document in data.documents]),
        "dead": int(np.sum(metrics.density(total) == 0)),
        "density_histogram": {"counts": counts.tolist(), "log10_edges": edges.tolist()},
        **groups,
    }


def reconstruct(dictionary: Dictionary, data: Data, sink_times: float) -> tuple[metrics.Totals, Groups]:
    """The totals of all rows, and each metric by position and by task."""
    x, y = (jnp.concatenate([rows(acts) for acts in data.acts]) for rows in (dictionary.read, dictionary.target))
    wanted = [sources.wanted(sources.Group.of(rows), sink_times) for rows in (x, y)]
    keep = np.flatnonzero(np.asarray(wanted[0] & wanted[1]))
    lengths = [len(document.tokens) for document in data.documents]
    position = np.concatenate([np.arange(length) for length in lengths])
    tasks = data.tasks
    task = np.repeat([tasks.index(document.task) for document in data.documents], lengths)
    by_position = np.searchsorted(POSITIONS, position[keep], "right") - 1
    totals = [
        totals_of(dictionary.module, x[keep], y[keep], jnp.asarray(group, jnp.int32), count)
        for group, count in ((by_position, len(POSITIONS)), (task[keep], len(tasks)))
    ]
    starts = [f"{start}+" for start in POSITIONS]
    groups = {"position": _named(totals[0], starts), "task": _named(totals[1], tasks)}
    return totals[1], groups | by_site(dictionary, x[keep], y[keep], metrics.summary(totals[1])["l0"])


def totals_of(
    module: sae.AbstractDictionary,
    x: Float[Array, "rows ..."],
    y: Float[Array, "rows ..."],
    group: Int[Array, " rows"] | None = None,
    groups: int = 1,
) -> metrics.Totals:
    """`metrics.totals` of any number of rows, a batch of them at a time."""
    mean = jnp.mean(y.astype(jnp.float32), axis=0)
    total = None
    for part in sources.batches(x.shape[0]):
        of = None if group is None else group[part]
        each = metrics.totals(module, x[part], mean, of, groups, y[part])
        total = each if total is None else jax.tree.map(jnp.add, total, each)
    assert total is not None  # sources and documents have rows
    return total


def _named(total: metrics.Totals, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics of each group that has rows."""
    columns = metrics.by_group(total)
    rows = {name: {key: float(column[at]) for key, column in columns.items()} for at, name in enumerate(names)}
    return {name: row for name, row in rows.items() if row["rows"] and np.isfinite(row["fvu"])}


def by_site(dictionary: Dictionary, x: Float[Array, "rows ..."], y: Float[Array, "rows ..."], l0: float) -> Groups:
    """FVU of each site that is written, where there are several: one that is long outweighs the others in the total."""
    if len(dictionary.place.writes) == 1:
        return {}
    made = jnp.concatenate([dictionary.module(x[part]) for part in sources.batches(x.shape[0])])
    true, guess = dictionary.by_site(y.astype(jnp.float32)), dictionary.by_site(made)
    rows = {site: {"rows": float(len(x)), "fvu": float(fvu(true[site], guess[site])), "l0": l0} for site in true}
    return {"sites": rows}
