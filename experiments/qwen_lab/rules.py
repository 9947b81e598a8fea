"""Where a model holds which rule a task follows: tasks whose variant is known, and what stands where a grid has ended."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import arc
import qwen_eqx
from arc.generators import FAMILIES, HELD_OUT_SEEDS
from qwen_lab import stopping
from qwen_lab.corpus import Document
from sae.evaluation import probing

MOST_VARIANTS = 8  # more leave too few tasks of each
AT_ONCE = 16  # documents


def families() -> tuple[str, ...]:
    """Those whose rule has a few variants, to be found out from the training pairs."""
    return tuple(name for name, family in FAMILIES.items() if 2 <= len(family.variants) <= MOST_VARIANTS)


def tasks(family: str, each: int, sides: tuple[int, int]) -> list[tuple[arc.Task, int]]:
    """The first `each` held-out tasks whose training pairs leave one variant, with its number, as many of each as can be."""
    rule = FAMILIES[family]
    share = -(-each // len(rule.variants))
    found: list[tuple[arc.Task, int]] = []
    counts = [0] * len(rule.variants)
    for seed in range(min(HELD_OUT_SEEDS, 20 * each)):
        task = arc.generators.make_task(family, seed, sides=sides)
        left = rule.consistent(task.train)
        if len(left) == 1 and counts[number := rule.variants.index(left[0])] < share:
            counts[number] += 1
            found.append((task, number))
        if sum(counts) >= each:
            break
    return found


@dataclasses.dataclass(frozen=True)
class Read:
    """Activations of one family's documents: at the end of each training pair, and where the answer is next."""

    labels: Int[np.ndarray, " documents"]
    rows: dict[str, dict[str, Float[np.ndarray, "documents width"]]]
    """When -> site -> what stands there."""


def places(document: Document) -> dict[str, int]:
    """The tokens that are looked at, by name."""
    ends = {}
    for pair in range(document.pairs):
        last = max(cell.end for cell in document.cells if cell.pair == pair and cell.part == "output")
        ends[f"pair {pair + 1} read"] = next(n for n, (_, end) in enumerate(document.offsets) if end >= last)
    begin = min(cell.start for cell in document.cells if cell.pair >= document.pairs and cell.part == "output")
    first = next(number for number, (_, end) in enumerate(document.offsets) if end > begin)
    return ends | {"answer next": first - 1}


def read(model: qwen_eqx.Qwen, documents: Sequence[Document], labels: Sequence[int], sites: Sequence[str]) -> Read:
    """What the model computes at the places of each document, whose training pairs must all fit."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for begin in range(0, len(documents), AT_ONCE):
        stopping.check()
        part = documents[begin : begin + AT_ONCE]
        _, acts = model.run_with_capture([document.tokens for document in part], sites, logits=None)
        for site, rows in acts.items():
            host = np.asarray(rows, np.float32)
            for number, document in enumerate(part):
                for when, at in places(document).items():
                    found.setdefault(when, {}).setdefault(site, []).append(host[number, at])
    stacked = {when: {site: np.stack(rows) for site, rows in each.items()} for when, each in found.items()}
    return Read(np.asarray(labels), stacked)


def probed(family: Read, seed: int) -> Iterator[dict[str, Any]]:
    """Of each place and site: how often a probe trained on half of the tasks reads the variant off the others."""
    order = np.random.default_rng(seed).permutation(len(family.labels))
    halves = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    for when, sites in family.rows.items():
        for site, rows in sites.items():
            training, measuring = (probing.Rows(rows[half], family.labels[half]) for half in halves)
            yield {"when": when, "site": site} | probing.accuracy(training, measuring, seed=seed)._asdict()
