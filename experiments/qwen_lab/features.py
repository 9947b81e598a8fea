"""Latents beside plain properties of cells: which fires where, what else does as well, and what follows if it is removed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import qwen_eqx
import sae
from qwen_lab import labels, stopping
from qwen_lab.corpus import Document
from qwen_lab.evaluation import Data
from qwen_lab.places import Dictionary
from sae.evaluation import matching

Code = Callable[[int], Float[np.ndarray, "seq latents"]]
"""The latents of document number i, or what is put in their place."""


@dataclasses.dataclass(frozen=True)
class Halves:
    """Documents whose tasks choose thresholds, and those that measure."""

    choosing: list[int]
    measuring: list[int]

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "Halves":
        tasks = list(dict.fromkeys(document.task for document in documents))
        first = set(tasks[: len(tasks) // 2])
        numbers = range(len(documents))
        return cls(
            [n for n in numbers if documents[n].task in first], [n for n in numbers if documents[n].task not in first]
        )


def matched(code: Code, told: Sequence[np.ndarray], halves: Halves) -> matching.Matches:
    """F1 of every latent with every property of `labels.NAMES`; `told` is [seq, properties] of each document."""
    rows = ([matching.Rows(code(n), told[n]) for n in half] for half in (halves.choosing, halves.measuring))
    return matching.match(*rows)


def codes_of(dictionary: Dictionary, data: Data) -> Code:
    """The latents of a dictionary."""
    return lambda number: sae.encoded(dictionary.module, dictionary.read(data.acts[number]))


def controls(dictionary: Dictionary, data: Data, blank: Data | None, halves: Halves, seed: int) -> dict[str, Code]:
    """What fires without having been learned: single dimensions, principal directions, random latents, a random model.

    Directions count in both signs. `blank` is the same documents read by a model of the same shape with random weights;
    without it the others are given.
    """
    rows = [np.asarray(dictionary.read(acts), np.float32) for acts in data.acts]
    others = [np.asarray(dictionary.read(acts), np.float32) for acts in (blank.acts if blank else ())]
    module = dictionary.module
    drawn = jax.random.normal(jax.random.key(seed), (module.d_sae, rows[0].shape[-1]), jnp.float32)
    rate = float(np.mean([(codes_of(dictionary, data)(n) > 0).mean() for n in halves.choosing[:8]]))
    return {
        "dimensions": _both_signs(rows, np.eye(rows[0].shape[-1], dtype=np.float32), halves),
        "principal directions": _both_signs(rows, _principal(rows, halves), halves),
        "random directions": _fires_as_often(rows, np.asarray(drawn), rate, halves),
        **({"random weights": _both_signs(others, _principal(others, halves), halves)} if others else {}),
    }


def _principal(rows: Sequence[np.ndarray], halves: Halves) -> Float[np.ndarray, "directions width"]:
    """All principal directions of the rows that choose."""
    chosen = np.concatenate([rows[n] for n in halves.choosing]).astype(np.float64)
    _, directions = np.linalg.eigh(np.cov(chosen.T))
    return directions.T.astype(np.float32)


def _both_signs(rows: Sequence[np.ndarray], directions: np.ndarray, halves: Halves) -> Code:
    mean = np.concatenate([rows[n] for n in halves.choosing]).mean(axis=0)

    def code(number: int) -> Float[np.ndarray, "seq latents"]:
        along = (rows[number] - mean) @ directions.T
        return np.maximum(np.concatenate([along, -along], axis=1), 0)

    return code


def _fires_as_often(rows: Sequence[np.ndarray], directions: np.ndarray, rate: float, halves: Halves) -> Code:
    """Random directions, each above the threshold that lets it fire as often as the dictionary's latents do."""
    chosen = np.concatenate([rows[n] for n in halves.choosing])
    mean = chosen.mean(axis=0)
    least = np.quantile((chosen - mean) @ directions.T, 1 - rate, axis=0)
    return lambda number: np.maximum((rows[number] - mean) @ directions.T - least, 0)


@dataclasses.dataclass(frozen=True)
class Removal:
    """What removing a latent costs: nats of the right next token, where the property holds and elsewhere."""

    where_it_holds: float
    elsewhere: float
    changed: float
    """Share of the property's places whose likeliest next token changes."""


def removed(
    data: Data, dictionary: Dictionary, latent: int, holds: Sequence[np.ndarray], numbers: Sequence[int]
) -> Removal:
    """The effect of holding one latent at 0, its dictionary's error put back, on predictions of these documents.

    `holds` is [seq] of each document: where the property does.
    """
    held = sae.Clamped(dictionary.module, jnp.int32(latent), jnp.float32(0))
    (site,) = dictionary.place.writes
    edit = qwen_eqx.Replace(held, error_of=dictionary.module, site=site)
    costs, marks, changes = [], [], []
    for number in numbers:
        stopping.check()
        tokens = data.documents[number].tokens
        before, after = (_log_probs(data.model, tokens, edits) for edits in ((), (edit,)))
        following = np.asarray(tokens[1:])[:, None]
        costs.append(np.take_along_axis(before - after, following, axis=1)[:, 0])
        changes.append(before.argmax(axis=1) != after.argmax(axis=1))
        marks.append(holds[number][:-1])
    cost, mark, change = (np.concatenate(each) for each in (costs, marks, changes))
    return Removal(_mean(cost[mark]), _mean(cost[~mark]), _mean(change[mark]))


def _log_probs(model: qwen_eqx.Qwen, tokens: Sequence[int], edits: Sequence[qwen_eqx.AbstractEdit]) -> np.ndarray:
    table, _ = model.run_with_capture(tokens, [], edits=edits)
    assert table is not None  # logits were asked for
    return np.asarray(jax.nn.log_softmax(table[:-1], axis=-1))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def as_rows(found: matching.Matches, pairs: np.ndarray, others: dict[str, matching.Matches]) -> list[dict[str, Any]]:
    """A line for each (latent, property): its F1, and the best F1 with that property of each control."""
    lines = []
    for latent, name in pairs:
        best = {control: float(each.f1[:, name].max()) for control, each in others.items()}
        lines.append(
            {
                "latent": int(latent),
                "property": labels.NAMES[name],
                "f1": float(found.f1[latent, name]),
                "density": float(found.density[latent]),
                "controls": best,
            }
        )
    return lines
