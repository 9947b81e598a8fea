"""From an SAE and ARC tasks to feature pages: documents with their grids' places, latents per token, painted cells."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import arc
import qwen_eqx
import sae
from arc.encode import Code, Encoder, Json, LineEncoder, Shape

UNSEEN = "arc-agi-1/evaluation"
OPEN, CLOSE = "\ue000", "\ue001"  # private characters that mark a grid's text while a prompt is built


@dataclasses.dataclass(frozen=True)
class Marked(Encoder):
    """An encoder's text between two marks, so that a grid is found wherever a prompt puts it."""

    inner: Encoder

    def encode(self, grid: arc.Grid) -> str:
        return OPEN + self.inner.encode(grid) + CLOSE

    def rows(self, text: str) -> list[list[int]]:
        return self.inner.rows(text.strip(OPEN + CLOSE))

    @property
    def opening(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.opening


@dataclasses.dataclass(frozen=True)
class PlacedGrid:
    """A grid of a document, with the characters [start, end) of each cell."""

    title: str
    cells: arc.Grid
    spans: list[list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Document:
    """One test input with its right answer where that is known, as a model reads it."""

    task: str
    test: int
    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]]  # the characters of each token
    grids: list[PlacedGrid]

    def pieces(self) -> list[str]:
        """The text of each token."""
        return [self.text[start:end] for start, end in self.offsets]

    def painted(self, values: Float[np.ndarray, " seq"]) -> list[sae.report.Grid]:
        """Each grid with the largest activation among the tokens that a cell's characters lie in."""
        of_char = np.zeros(len(self.text) + 1, np.float32)
        for (start, end), value in zip(self.offsets, values, strict=True):
            np.maximum(of_char[start:end], value, out=of_char[start:end])
        return [
            sae.report.Grid(
                grid.title,
                grid.cells.astype(np.int64),
                np.asarray([[of_char[a:b].max(initial=0.0) for a, b in row] for row in grid.spans], np.float32),
            )
            for grid in self.grids
        ]


def documents(
    tasks: Sequence[arc.Task],
    tokenizer: qwen_eqx.Tokenizer,
    *,
    max_tokens: int,
    encoder: str = arc.DEFAULT_ENCODER,
    format: str = arc.DEFAULT_PROMPT,
) -> list[Document]:
    """Every test input that fits, with training pairs left out if need be."""
    found = (
        _document(task, test, tokenizer, max_tokens, arc.encode.as_encoder(encoder), format)
        for task in tasks
        for test in range(len(task.test))
    )
    kept = [document for document in found if document is not None]
    if not kept:
        raise arc.InputError(f"--max-tokens {max_tokens}: found no prompt that fits, expected some")
    return kept


def _document(
    task: arc.Task, test: int, tokenizer: qwen_eqx.Tokenizer, max_tokens: int, encoder: Encoder, format: str
) -> Document | None:
    template = tokenizer.render_chat if tokenizer.chat_template is not None else None
    truth = task.test[test].output
    answer = "" if truth is None else encoder.encode(truth)[len(encoder.opening) :]
    arc.prompt.as_format(format)  # a wrong name raises here, not as a prompt too long
    try:
        prompt = arc.prompt.build(
            task,
            test,
            encoder=Marked(encoder),
            format=format,
            template=template,
            count=lambda text: len(tokenizer.encode(_unmarked(text)[0] + answer)),
            budget=max_tokens,
        )
    except arc.InputError:  # too long even with one pair
        return None
    text, starts = _unmarked(prompt.text)
    grids: list[tuple[str, arc.Grid]] = []
    for number, pair in enumerate(pair for at, pair in enumerate(task.train) if at not in prompt.dropped):
        assert pair.output is not None
        grids += [(f"example {number + 1}, input", pair.input), (f"example {number + 1}, output", pair.output)]
    grids.append(("test input", task.test[test].input))
    if truth is not None:
        grids.append(("right answer", truth))
        starts.append(len(text) - len(encoder.opening))
        text += answer
    placed = [
        PlacedGrid(title, grid, [[(at + a, at + b) for a, b in row] for row in cell_spans(encoder, grid)])
        for (title, grid), at in zip(grids, starts, strict=True)
    ]
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    return Document(task.id, test, text, encoding.ids, list(encoding.offsets), placed)


def _unmarked(text: str) -> tuple[str, list[int]]:
    """The text without marks, and where in it each marked grid starts."""
    starts, plain = [], 0
    for part in re.split(f"({OPEN}|{CLOSE})", text):
        if part == OPEN:
            starts.append(plain)
        elif part != CLOSE:
            plain += len(part)
    return text.replace(OPEN, "").replace(CLOSE, ""), starts


def cell_spans(encoder: Encoder, grid: arc.Grid) -> list[list[tuple[int, int]]]:
    """The characters [start, end) of each cell in `encoder.encode(grid)`; a separator belongs to the cell after it."""
    if isinstance(encoder, Code | Shape):
        start = encoder.encode(grid).index("\n") + 1
        return [[(start + a, start + b) for a, b in row] for row in cell_spans(encoder.inner, grid)]
    if isinstance(encoder, Json):
        digits = iter([match.span() for match in re.finditer("[0-9]", encoder.encode(grid))])
        return [[next(digits) for _ in row] for row in grid]
    if isinstance(encoder, LineEncoder):
        spans, at = [], 0
        for index, cells in enumerate(grid.tolist()):
            ends = [at + len(encoder.line(cells[:count], index)) for count in range(len(cells) + 1)]
            spans.append(list(itertools.pairwise(ends)))
            at = ends[-1] + 1  # the line end
        return spans
    raise arc.InputError(f"encoder {encoder}: found no known layout of cells, expected an encoder of arc.encode")


def latents(
    module: sae.AbstractSAE,
    survey: sae.Survey,
    found: Sequence[Document],
    codes: Sequence[Float[np.ndarray, "_ chosen"]],
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    chosen: Sequence[int],
) -> list[sae.report.Latent]:
    """The pages of the chosen latents, whose values `codes` holds; promoted tokens by the logit lens through the final

    norm's gain, none where the SAE does not write into the residual stream's width.
    """
    head = model.embed.table if model.head is None else model.head.weight
    lens = (head.astype(jnp.float32) * model.norm.weight.astype(jnp.float32)[None]).T
    directions = module.decoder[jnp.asarray(chosen, jnp.int32)]
    promoted = suppressed = [[] for _ in chosen]
    if module.d_out == lens.shape[0]:
        promoted, suppressed = _tokens(directions, lens, tokenizer), _tokens(-directions, lens, tokenizer)
    return [
        sae.report.Latent(
            index=latent,
            density=float(survey.density[latent]),
            mean=float(survey.mean[latent]),
            histogram=survey.histogram[latent],
            examples=[_example(found[number], codes[number][:, place]) for number in survey.documents(latent)],
            promoted=promoted[place],
            suppressed=[(token, -logit) for token, logit in suppressed[place]],
        )
        for place, latent in enumerate(chosen)
    ]


def _tokens(directions: jax.Array, lens: jax.Array, tokenizer: qwen_eqx.Tokenizer) -> list[list[tuple[str, float]]]:
    ids, logits = sae.promoted_tokens(directions, lens)
    return [
        [(tokenizer.decode([token]), float(logit)) for token, logit in zip(row, values, strict=True)]
        for row, values in zip(ids, logits, strict=True)
    ]


def _example(document: Document, values: Float[np.ndarray, " seq"]) -> sae.report.Example:
    """A document, with those grids on which the latent fired somewhere (else the test input)."""
    painted = document.painted(values)
    shown = [grid for grid in painted if grid.activations.max() > 0][:6] or painted[-2:-1]
    return sae.report.Example(f"task {document.task}, test {document.test}", document.pieces(), values, shown)


def unseen_tasks(metadata: Mapping[str, Any], tasks: str | None) -> list[arc.Task]:
    """The data set asked for; without one the tasks that an SAE's training held out, or the evaluation set of ARC-AGI-1."""
    held_out = metadata.get("held_out_tasks")
    if tasks is not None or not isinstance(held_out, list) or not isinstance(metadata.get("tasks"), str):
        return list(arc.load_tasks(tasks or UNSEEN))
    name = metadata["tasks"]
    picked = [task for task in arc.load_tasks(name) if task.id in set(held_out)]
    if not picked:
        raise arc.InputError(f"--tasks: found none of the SAE's held-out tasks in {name}, expected them; name others")
    return picked
