"""What a model writes for documents: as it is, and with a latent's direction added."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import arc
import qwen_eqx
from arc.ask import Request
from arc.augment import IDENTITY
from arc.encode import as_encoder
from qwen_lab import completions, stopping
from qwen_lab.corpus import Document
from qwen_lab.evaluation import Data
from qwen_lab.places import Dictionary

ROWS = 32  # that are generated at once
STRENGTH = 4.0  # as steer.py's, in units of a latent's peak
VERDICTS = {"correct": "right", "parsed": "a grid; the right one is not known"}


@dataclasses.dataclass(frozen=True)
class Written:
    """An answer: its text, the grid in it, and `correct`, `wrong`, or why it is no grid."""

    text: str
    grid: arc.Grid | None
    verdict: str


def write(data: Data, numbers: Sequence[int], added: Sequence[tuple[Dictionary, int, float]] = ()) -> list[Written]:
    """The model's greedy answer to each of these documents; to the n-th with a latent's direction added.

    `added[n]` is the dictionary, the same for all, the latent, and what its direction is multiplied with.
    """
    room = max((len(document.tokens) - document.asked for document in data.documents), default=0)
    room = -(-(room + 2) // 16) * 16  # few shapes; 2 for the stop token and a token more
    found = []
    for start in range(0, len(numbers), ROWS):
        stopping.check()
        asked = list(numbers[start : start + ROWS])
        rows = [*asked, *asked[-1:] * (min(ROWS, len(numbers)) - len(asked))]  # one shape for all
        edits = _edits(added[start : start + ROWS], len(rows)) if added else ()
        prompts = [data.tokenizer.encode(data.documents[number].prompt.text) for number in rows]
        out = completions.generate(data.model, data.tokenizer, prompts, room, edits=edits)
        found += [_judged(data, out, row, data.documents[number]) for row, number in enumerate(asked)]
    return found


def _edits(added: Sequence[tuple[Dictionary, int, float]], rows: int) -> list[qwen_eqx.AbstractEdit]:
    """A direction for each row, at every site that the dictionary writes."""
    dictionary = added[0][0]
    latents = jnp.asarray([latent for _, latent, _ in added], jnp.int32)
    values = jnp.asarray([value for *_, value in added], jnp.float32)
    by_site = dictionary.by_site(dictionary.module.decoder[latents])
    edits: list[Any] = []
    for site, directions in by_site.items():
        scaled = directions.astype(jnp.float32) * values[:, None]
        padded = jnp.pad(scaled, ((0, rows - len(added)), (0, 0)))
        edits.append(qwen_eqx.Steer(padded, site=site))
    return edits


def _judged(data: Data, out: qwen_eqx.Generation, row: int, document: Document) -> Written:
    encoder = as_encoder(document.asking.encoder)
    request = Request(document.task, document.test, IDENTITY, document.prompt, encoder)
    sample = completions.read(out, row, request, data.tokenizer)
    said = completions.outcome(sample, document.puzzle)
    grid = None if sample.grid is None else np.asarray(sample.grid)
    return Written(sample.completion.text, grid, VERDICTS.get(said, said))
