"""A gallery of latents, a static site: an index of all, and pages of what each fires on that are read when asked for.

The caller says what to show as plain values. `index.html` and its scripts are the same for every gallery; what is shown
lies beside them as JSON in calls of `receive`, because a page from the file system may load scripts and nothing else.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae import files
from sae.errors import InputError
from sae.evaluation.survey import EDGES

COLOURS = (  # of ARC's ten
    "#111111", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00", "#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231",
)  # fmt: skip
STATIC = Path(__file__).parent / "static"
FORMAT = 1
PER_PAGE = 64  # latents in a file
DIGITS = 4  # that count, of every number written


@dataclasses.dataclass(frozen=True)
class Grid:
    """A coloured grid of a document, and the tokens [first, end) that each cell stands in."""

    group: str
    """What it is part of: `example 1`, `test`."""
    title: str
    """What it is there: `input`, `output`."""
    cells: Int[np.ndarray, "rows cols"]
    tokens: Int[np.ndarray, "rows cols 2"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote for a document, and how that was judged; `read` is the document with this answer in it."""

    verdict: str
    text: str
    grid: Int[np.ndarray, "rows cols"] | None = None
    read: int | None = None


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, token by token, of which the first `prompt` are what was asked and the others the answer."""

    title: str
    tokens: Sequence[str]
    prompt: int
    grids: Sequence[Grid] = ()
    answer: Answer | None = None
    link: str = ""
    """Address of another page about it, relative to the gallery."""


@dataclasses.dataclass(frozen=True)
class Fired:
    """The tokens of a document on which a latent fired, and its values there."""

    document: int
    tokens: Int[np.ndarray, " fired"]
    values: Float[np.ndarray, " fired"]

    def __post_init__(self) -> None:
        if not np.isfinite(self.values).all():
            raise InputError(f"document {self.document}: found NaN or infinity, expected finite activations")


@dataclasses.dataclass(frozen=True)
class Example:
    """A document that shows a latent, why it was chosen, and where the latent fires when the model's own answer is read."""

    why: str
    fired: Fired
    own: Fired | None = None


@dataclasses.dataclass(frozen=True)
class Match:
    """A plain property that a latent fires with, and how well: F1 of it, and the best of each control."""

    name: str
    f1: float
    controls: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Steered:
    """A model's answer to a document with the latent's direction times `value` added, beside `Document.answer`."""

    document: int
    value: float
    after: Answer


@dataclasses.dataclass(frozen=True)
class Latent:
    """All that is shown of one latent; what is None or empty was not computed, and the dictionary's notes say why."""

    index: int
    density: float  # fraction of tokens on which it fired
    mean: float  # of its values where it fired
    peak: float  # its largest value
    histogram: Int[np.ndarray, " bins"]  # of its values between survey.EDGES
    examples: Sequence[Example] = ()
    promoted: Sequence[tuple[str, float]] = ()  # tokens its direction promotes, with their logits
    suppressed: Sequence[tuple[str, float]] = ()
    matches: Sequence[Match] = ()  # best first
    near: Sequence[tuple[int, float]] = ()  # other latents by cosine of decoder rows, largest first
    together: Sequence[tuple[int, float]] = ()  # other latents by share of common positions
    invariance: Mapping[str, float | None] = dataclasses.field(default_factory=dict)  # kind of change -> correlation
    steered: Steered | None = None


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """Some latents of one dictionary; `key` is its part of an address: `#/key/latent`."""

    key: str
    name: str
    layer: str
    latents: Iterable[Latent]
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Field of `Latent` -> how it was computed, or why not."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]*\w", self.key, re.ASCII) or self.key in ("documents", "index"):
            raise InputError(f"dictionary {self.name!r}: key: found {self.key!r}, expected letters and digits")


def write(
    directory: str | Path,
    title: str,
    dictionaries: Iterable[Dictionary],
    documents: Sequence[Document],
    *,
    facts: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
) -> Path:
    """Write the gallery and return its index.html; `links` are names and addresses of other pages.

    What of an earlier one is not written again stays there, and nothing leads to it.
    """
    home = Path(directory)
    data = home / "data"
    files.make_directory(data / "documents")
    (data / "index.js").unlink(missing_ok=True)  # written last: one that was cut off says so
    for number, document in enumerate(documents):
        _send(data, f"documents/{number:04}", _document(document, len(documents)))
    for name in ("gallery.css", "draw.js", "latent.js", "gallery.js"):
        files.commit(home / name, (STATIC / name).read_bytes())
    told = [_write_dictionary(data, each, len(documents)) for each in dictionaries]
    _send(
        data,
        "index",
        {
            "format": FORMAT,
            "title": title,
            "facts": list((facts or {}).items()),
            "links": [[name, _address(link)] for name, link in (links or {}).items()],
            "colours": COLOURS,
            "edges": [_short(edge) for edge in EDGES],
            "per_page": PER_PAGE,
            "dictionaries": told,
        },
    )
    files.commit(home / "index.html", (STATIC / "index.html").read_bytes())
    return home / "index.html"


def _write_dictionary(data: Path, dictionary: Dictionary, documents: int) -> dict[str, Any]:
    """Its latents in files of PER_PAGE, its columns in one; returns what the index says of it."""
    files.make_directory(data / dictionary.key)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    page: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    number = 0
    for latent in dictionary.latents:
        for name, value in _row(latent, names).items():
            columns[name].append(value)
        page.append(_latent(latent, documents))
        if len(page) == PER_PAGE:
            _send(data, f"{dictionary.key}/{number:04}", {"latents": page})
            page, number = [], number + 1
    if page:
        _send(data, f"{dictionary.key}/{number:04}", {"latents": page})
    _send(data, f"{dictionary.key}/index", {"properties": list(names), **columns})
    return {
        "key": dictionary.key,
        "name": dictionary.name,
        "layer": dictionary.layer,
        "latents": len(columns["latent"]),
        "facts": list(dictionary.facts.items()),
        "notes": list(dictionary.notes.items()),
    }


COLUMNS = ("latent", "density", "mean", "peak", "property", "f1", "twin", "invariance", "steered", "promotes")


def _row(latent: Latent, names: dict[str, int]) -> dict[str, Any]:
    """What the index knows of a latent; `names` numbers the properties."""
    best = latent.matches[0] if latent.matches else None
    kept = [value for value in latent.invariance.values() if value is not None]
    return {
        "latent": latent.index,
        "density": _short(latent.density),
        "mean": _short(latent.mean),
        "peak": _short(latent.peak),
        "property": -1 if best is None else names.setdefault(best.name, len(names)),
        "f1": 0 if best is None else _short(best.f1),
        "twin": _short(latent.near[0][1]) if latent.near else 0,
        "invariance": _short(min(kept)) if kept else None,
        "steered": int(latent.steered is not None),
        "promotes": [token for token, _ in latent.promoted[:3]],
    }


def _latent(latent: Latent, documents: int) -> dict[str, Any]:
    for fired in (each for example in latent.examples for each in (example.fired, example.own) if each is not None):
        if not 0 <= fired.document < documents:
            where = f"latent {latent.index}, example: document"
            raise InputError(f"{where}: found {fired.document}, expected one of the {documents} given")
    occupied = np.flatnonzero(latent.histogram)
    first, end = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 0)
    return {
        "latent": latent.index,
        "density": _short(latent.density),
        "mean": _short(latent.mean),
        "peak": _short(latent.peak),
        "histogram": {"first": first, "counts": latent.histogram[first:end].tolist()},
        "promoted": _pairs(latent.promoted),
        "suppressed": _pairs(latent.suppressed),
        "matches": [[one.name, _short(one.f1), _pairs(one.controls.items())] for one in latent.matches],
        "near": _pairs(latent.near),
        "together": _pairs(latent.together),
        "invariance": [[name, None if r is None else _short(r)] for name, r in latent.invariance.items()],
        "steered": None if latent.steered is None else _steered(latent.steered),
        "examples": [
            {"why": one.why, **_fired(one.fired), "own": None if one.own is None else _fired(one.own)}
            for one in latent.examples
        ],
    }


def _fired(fired: Fired) -> dict[str, Any]:
    values = [_short(value) for value in fired.values]
    return {"document": fired.document, "tokens": fired.tokens.tolist(), "values": values}


def _steered(steered: Steered) -> dict[str, Any]:
    return {"document": steered.document, "value": _short(steered.value), "after": _answer(steered.after)}


def _answer(answer: Answer) -> dict[str, Any]:
    grid = None if answer.grid is None else answer.grid.tolist()
    return {"verdict": answer.verdict, "text": answer.text, "grid": grid, "read": answer.read}


def _document(document: Document, documents: int) -> dict[str, Any]:
    answer = document.answer
    if answer is not None and answer.read is not None and not 0 <= answer.read < documents:
        raise InputError(f"{document.title!r}, answer: found document {answer.read}, expected one of {documents}")
    return {
        "title": document.title,
        "tokens": list(document.tokens),
        "prompt": document.prompt,
        "grids": [_grid(document, grid) for grid in document.grids],
        "answer": None if answer is None else _answer(answer),
        "link": _address(document.link) if document.link else "",
    }


def _grid(document: Document, grid: Grid) -> dict[str, Any]:
    where = f"{document.title!r}, grid {grid.group!r} {grid.title!r}"
    if grid.cells.size and not (grid.cells.min() >= 0 and grid.cells.max() < len(COLOURS)):
        raise InputError(f"{where}: found colours {grid.cells.min()} to {grid.cells.max()}, expected 0 to 9")
    if grid.tokens.size and not (grid.tokens.min() >= 0 and grid.tokens.max() <= len(document.tokens)):
        raise InputError(f"{where}: found token {grid.tokens.max()}, expected at most {len(document.tokens)}")
    return {
        "group": grid.group,
        "title": grid.title,
        "cells": ["".join(map(str, row)) for row in grid.cells.tolist()],
        "tokens": grid.tokens.reshape(-1).tolist(),
    }


def _pairs(pairs: Iterable[tuple[Any, float]]) -> list[list[Any]]:
    return [[name, _short(value)] for name, value in pairs]


def _short(value: float | np.floating) -> float:
    """A number of DIGITS digits, so that files stay small."""
    return float(f"{float(value):.{DIGITS}g}")


def _address(link: str) -> str:
    """A place beside or below the gallery: no scheme, no other host, no way up."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", link, re.ASCII):
        raise InputError(f"link: found {link!r}, expected a relative path of letters, digits, dots and dashes")
    return link


def _send(data: Path, name: str, value: Mapping[str, Any]) -> None:
    """`receive("name", JSON);` in data/name.js, all of it ASCII: half a character of a token survives."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    files.commit(data / f"{name}.js", f'receive("{name}",{text});\n'.encode("ascii"))
