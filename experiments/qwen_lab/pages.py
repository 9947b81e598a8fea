"""The gallery of an evaluation: every latent of its dictionaries, painted on the grids of documents."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.sparse
from jaxtyping import Float

import qwen_eqx
import sae
from qwen_lab import answers, features, figures, invariance, labels, lens, meshes
from qwen_lab.corpus import Document
from qwen_lab.evaluation import Data
from qwen_lab.invariance import Twin
from qwen_lab.places import Dictionary
from sae import gallery
from sae.evaluation import neighbours, survey

MATCHES, NEIGHBOURS = 3, 12  # shown of each latent
LARGEST_BLANK = 10**9  # weights: a larger model has no twin with random ones beside it


@dataclasses.dataclass(frozen=True)
class Detail:
    """How much is computed for the pages beyond what latents fire on."""

    examples: int = 4
    """Documents with the largest values that are shown of a latent, beside three from the rest of its range."""
    answered: int = 20
    """Documents that the model answers, from the first."""
    steered: int = 24
    """Latents, over all densities, whose direction is added while the model answers one of those again."""
    augmented: int = 8
    """Documents whose tasks are read turned, recoloured and reordered, from the first."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Read:
    """What is read and written once for all dictionaries. Own documents are those with the model's own answer in them."""

    data: Data
    detail: Detail
    answers: dict[int, answers.Written]
    own: dict[int, int]  # document -> its place among those of `owned`
    owned: Data
    twins: list[Twin]
    twinned: Data
    blank: Data | None  # read by a model of the same shape with random weights

    @classmethod
    def of(cls, data: Data, dictionaries: Sequence[Dictionary], detail: Detail) -> "Read":
        places = [one.place for one in dictionaries]
        numbers = range(min(detail.answered, len(data.documents)))
        written = dict(zip(numbers, answers.write(data, numbers), strict=True)) if numbers else {}
        others: dict[int, Document] = {}
        for number, answer in written.items():
            if answer.grid is not None and answer.verdict != "right":
                others[number] = data.documents[number].answered(answer.grid, data.tokenizer)
        twins = invariance.twins(data, detail.augmented, detail.seed)
        again = dataclasses.replace(data, documents=[], acts=[])
        return cls(
            data,
            detail,
            written,
            {number: place for place, number in enumerate(others)},
            _read(again, list(others.values()), places),
            twins,
            _read(again, [twin.document for twin in twins], places),
            _blank(data, places),
        )


def _read(data: Data, documents: Sequence[Document], places: Sequence[Any]) -> Data:
    return Data.read(data.model, data.tokenizer, documents, places, data.model_name)


def _blank(data: Data, places: Sequence[Any]) -> Data | None:
    weights = sum(leaf.size for leaf in jax.tree.leaves(data.model) if hasattr(leaf, "size"))
    if weights > LARGEST_BLANK or len(data.tasks) < 2:
        return None
    made = qwen_eqx.Qwen.init(data.model.config, key=jax.random.key(0), dtype=data.model.embed.table.dtype)
    return Data.read(meshes.beside(data.model, made), data.tokenizer, data.documents, places, "random weights")


def write_gallery(
    directory: str | Path,
    dictionaries: Sequence[Dictionary],
    data: Data,
    *,
    detail: Detail | None = None,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """A gallery of all latents of these dictionaries; returns its index.html. `scores` are of `evaluate`, by name.

    Pages of tasks that are there already are linked: `tasks/index.html`, `tasks/TASK.html`, `tasks/TASK-test1.html`.
    """
    read = Read.of(data, dictionaries, detail or Detail())
    facts = {
        "model": data.model_name,
        "documents": f"{len(data.documents)} of {len(data.tasks)} tasks",
        "tokens": f"{sum(len(document.tokens) for document in data.documents):,}",
    }
    if read.answers:
        right = sum(one.verdict == "right" for one in read.answers.values())
        facts["right answers"] = f"{right} of {len(read.answers)}"
    tasks = {"Tasks": "tasks/index.html"} if (Path(directory) / "tasks" / "index.html").exists() else {}
    shown = (_shown(str(key), one, read, (scores or {}).get(one.name, {})) for key, one in enumerate(dictionaries))
    title = f"Latents of {dictionaries[0].name if len(dictionaries) == 1 else data.model_name}"
    return gallery.write(directory, title, shown, documents_of(read, Path(directory)), facts=facts, links=tasks)


def documents_of(read: Read, directory: Path) -> list[gallery.Document]:
    """The documents, then those with the model's own answers."""
    count, made = len(read.data.documents), []
    for number, document in enumerate(read.data.documents):
        answer, own = read.answers.get(number), read.own.get(number)
        place = count + own if own is not None else number if answer and answer.verdict == "right" else None
        page = f"tasks/{document.task}{f'-test{document.test}' if document.test else ''}.html"
        link = page if (directory / page).exists() else ""
        made.append(document_of(document, read.data.tokenizer, answer and _answer(answer, place), link))
    return made + [document_of(document, read.data.tokenizer) for document in read.owned.documents]


def document_of(
    document: Document, tokenizer: qwen_eqx.Tokenizer, answer: gallery.Answer | None = None, link: str = ""
) -> gallery.Document:
    """A document as a gallery shows it. A token that shares its character with others is spelled as bytes."""
    spans = document.offsets
    shared = [span in (*spans[max(0, at - 1) : at], *spans[at + 1 : at + 2]) for at, span in enumerate(spans)]
    pieces = [
        lens.token_text(tokenizer, token) if part else piece
        for token, piece, part in zip(document.tokens, document.pieces(), shared, strict=True)
    ]
    grids = [
        gallery.Grid(grid.group, grid.title, grid.cells.astype(np.int64), document.tokens_of(grid))
        for grid in document.grids
    ]
    title = f"task {document.task}, test {document.test}"
    return gallery.Document(title, pieces, document.asked, grids, answer, link)


def _answer(written: answers.Written, read: int | None = None) -> gallery.Answer:
    grid = None if written.grid is None else written.grid.astype(np.int64)
    return gallery.Answer(written.verdict, written.text, grid, read)


def _shown(key: str, dictionary: Dictionary, read: Read, scores: Mapping[str, Any]) -> gallery.Dictionary:
    module = dictionary.module
    blocks = {found.layer for each in dictionary.place.writes if (found := qwen_eqx.Site.spelled(each)) is not None}
    facts = {"site": str(dictionary.place), "dictionary": f"{module.name}, {module.d_sae:,} latents"}
    layer = ", ".join(map(str, sorted(blocks)))
    codes = [fired(sae.encoded(module, rows)) for rows in read.data.rows(dictionary)]
    parts = Parts.of(dictionary, read, codes)
    return gallery.Dictionary(
        key, dictionary.name, layer, _latents(parts, read, codes), facts | figures.written(scores), parts.notes
    )


def fired(codes: Float[np.ndarray, "seq d_sae"]) -> scipy.sparse.csr_array:
    """The values above zero alone."""
    return scipy.sparse.csr_array(np.maximum(codes, 0))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is computed for all latents of a dictionary at once, and the notes that say how."""

    found: sae.Survey
    peaks: Float[np.ndarray, "documents d_sae"]
    own: list[scipy.sparse.csc_array]
    promoted: list[list[tuple[str, float]]]
    suppressed: list[list[tuple[str, float]]]
    matches: list[list[gallery.Match]]
    near: list[list[tuple[int, float]]]
    together: list[list[tuple[int, float]]]
    invariance: Mapping[str, Float[np.ndarray, " d_sae"]]
    steered: Mapping[int, gallery.Steered]
    notes: dict[str, str]

    @classmethod
    def of(cls, dictionary: Dictionary, read: Read, codes: Sequence[scipy.sparse.csr_array]) -> "Parts":
        module, notes = dictionary.module, {}
        found = sae.Survey.take((code.toarray() for code in codes), d_sae=module.d_sae, examples=1)
        peaks = np.stack([code.max(axis=0).toarray().ravel() for code in codes])
        own = [fired(sae.encoded(module, rows)).tocsc() for rows in read.owned.rows(dictionary)]
        promoted, suppressed = _logits(dictionary, read.data, notes)
        rows = np.asarray(module.decoder, np.float32).reshape(module.d_sae, -1)
        places, cosines = neighbours.nearest(rows, NEIGHBOURS)
        near = [list(zip(at.tolist(), of.tolist(), strict=True)) for at, of in zip(places, cosines, strict=True)]
        together, positions = neighbours.together(codes, NEIGHBOURS)
        notes["together"] = f"Positions where both fire over those where either does, of {positions:,}."
        kinds, cells = invariance.correlations(dictionary, read.data, read.twins, read.twinned)
        notes["invariance"] = (
            f"Correlation of its value on a cell with that on the same cell of the changed task, {cells:,} cells of "
            f"{len({twin.original for twin in read.twins})} documents."
            if kinds
            else "It was not computed: --augmented is 0."
        )
        matches = _matches(dictionary, read, codes, notes)
        steered = _steered(dictionary, read, found, peaks, notes)
        return cls(found, peaks, own, promoted, suppressed, matches, near, together, kinds, steered, notes)


def _logits(
    dictionary: Dictionary, data: Data, notes: dict[str, str]
) -> tuple[list[list[tuple[str, float]]], list[list[tuple[str, float]]]]:
    """Promoted and suppressed tokens by the logit lens, at the last site that is written."""
    table = lens.lens_of(data.model)
    *_, directions = dictionary.by_site(dictionary.module.decoder).values()
    if directions.shape[1] != table.shape[0]:
        notes["promoted"] = "It was not computed: this site has not the residual stream's width."
        none: list[list[tuple[str, float]]] = [[] for _ in range(dictionary.module.d_sae)]
        return none, none
    notes["promoted"] = "Its direction through the final norm's gain and the unembedding (the logit lens)."
    up, down = (lens.tokens_along(sign * directions, table, data.tokenizer) for sign in (1, -1))
    return up, [[(token, -logit) for token, logit in row] for row in down]


def _matches(
    dictionary: Dictionary, read: Read, codes: Sequence[scipy.sparse.csr_array], notes: dict[str, str]
) -> list[list[gallery.Match]]:
    """The plain properties that each latent fires with best, beside the best of each control for that property."""
    data, d_sae = read.data, dictionary.module.d_sae
    if len(data.tasks) < 2:
        notes["matches"] = "It was not computed: one task chooses thresholds, another measures, and there is only one."
        return [[] for _ in range(d_sae)]
    told = [labels.of_document(document) for document in data.documents]
    halves = features.Halves.of(data.documents)
    f1 = features.matched(lambda number: codes[number].toarray(), told, halves).f1
    controls: dict[str, np.ndarray] = {}
    if not dictionary.module.several_sites:
        made = features.controls(dictionary, data, read.blank, halves, read.detail.seed)
        controls = {name: features.matched(code, told, halves).f1.max(axis=0) for name, code in made.items()}
    notes["matches"] = (
        f"F1 on {len(halves.measuring)} documents, cuts chosen on {len(halves.choosing)} of other tasks; beside it the "
        f"best of each control for that property{'' if controls else ' (none for a dictionary of several sites)'}."
    )
    order = np.argsort(-f1, axis=1, kind="stable")[:, :MATCHES]
    return [
        [
            gallery.Match(
                labels.NAMES[at], float(f1[latent, at]), {name: float(best[at]) for name, best in controls.items()}
            )
            for at in order[latent]
            if f1[latent, at] > 0
        ]
        for latent in range(d_sae)
    ]


def _steered(
    dictionary: Dictionary, read: Read, found: sae.Survey, peaks: np.ndarray, notes: dict[str, str]
) -> dict[int, gallery.Steered]:
    """Of some latents the answer to the document where each is strongest, its direction added at every position."""
    width = read.data.model.config.d_model
    if dictionary.module.decoder.shape[-1] != width:
        notes["steered"] = "It was not computed: this site has not the residual stream's width."
        return {}
    among = peaks[: len(read.answers)]
    chosen = [latent for latent in found.choose(read.detail.steered) if len(among) and among[:, latent].max() > 0]
    if not chosen:
        notes["steered"] = "It was not computed: --steered or --answered is 0, or none fires on what was answered."
        return {}
    numbers = [int(among[:, latent].argmax()) for latent in chosen]
    values = [answers.STRENGTH * float(peaks[:, latent].max()) for latent in chosen]
    added = [(dictionary, latent, value) for latent, value in zip(chosen, values, strict=True)]
    written = answers.write(read.data, numbers, added)
    notes["steered"] = (
        f"{len(chosen)} latents over all densities are steered, by {answers.STRENGTH:g} times their peak, and no others."
    )
    return {
        latent: gallery.Steered(number, value, _answer(one))
        for latent, number, value, one in zip(chosen, numbers, values, written, strict=True)
    }


def _latents(parts: Parts, read: Read, codes: Sequence[scipy.sparse.csr_array]) -> Iterator[gallery.Latent]:
    """Every latent, one at a time."""
    columns = [code.tocsc() for code in codes]
    density, mean = parts.found.density, parts.found.mean
    for latent in range(len(density)):
        examples = [
            gallery.Example(why, _fires(columns[number], latent, number), _own(parts, read, latent, number))
            for number, why in survey.examples(parts.peaks[:, latent], read.detail.examples)
        ]
        kept = {kind: None if np.isnan(r[latent]) else float(r[latent]) for kind, r in parts.invariance.items()}
        yield gallery.Latent(
            index=latent,
            density=float(density[latent]),
            mean=float(mean[latent]),
            peak=float(parts.peaks[:, latent].max()),
            histogram=parts.found.histogram[latent],
            examples=examples,
            promoted=parts.promoted[latent],
            suppressed=parts.suppressed[latent],
            matches=parts.matches[latent],
            near=parts.near[latent],
            together=parts.together[latent],
            invariance=kept,
            steered=parts.steered.get(latent),
        )


def _own(parts: Parts, read: Read, latent: int, number: int) -> gallery.Fired | None:
    place = read.own.get(number)
    return None if place is None else _fires(parts.own[place], latent, len(read.data.documents) + place)


def _fires(code: scipy.sparse.csc_array, latent: int, document: int) -> gallery.Fired:
    start, end = code.indptr[latent : latent + 2]
    return gallery.Fired(document, code.indices[start:end], code.data[start:end])
