"""Feature pages: what each latent fires on, as one HTML file that needs nothing else.

The caller says what to show as plain values (`Latent`, `Example`, `Grid`); every text is escaped, nothing is fetched
and nothing runs: the page forbids both to the browser and sorts its index with style rules alone.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from sae import files
from sae.errors import InputError
from sae.evaluation.survey import EDGES

COLOURS = (  # of ARC's ten
    "#111111", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00", "#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231",
)  # fmt: skip
CONTEXT = 40  # tokens shown on either side of an example's peak
LEVELS = 8  # dot sizes on a grid
FADED = ' opacity=".38"'  # cells on which the latent is silent


@dataclasses.dataclass(frozen=True)
class Grid:
    """A coloured grid and how strongly the latent fired on each cell (0 where it did not)."""

    title: str
    cells: Int[np.ndarray, "rows cols"]
    activations: Float[np.ndarray, "rows cols"]


@dataclasses.dataclass(frozen=True)
class Example:
    """A document on which a latent fired, token by token."""

    title: str
    tokens: Sequence[str]
    activations: Float[np.ndarray, " seq"]
    grids: Sequence[Grid] = ()


@dataclasses.dataclass(frozen=True)
class Latent:
    """One latent's page."""

    index: int
    density: float  # fraction of tokens on which it fired
    mean: float  # of its values where it fired
    histogram: Int[np.ndarray, " bins"]  # of its values between survey.EDGES
    examples: Sequence[Example]
    promoted: Sequence[tuple[str, float]] = ()  # tokens its direction promotes, with their logits
    suppressed: Sequence[tuple[str, float]] = ()

    @property
    def peak(self) -> float:
        """Its largest value in any example: what full colour stands for."""
        return max((float(np.max(example.activations, initial=0)) for example in self.examples), default=0.0)


def write(
    path: str | Path,
    title: str,
    latents: Sequence[Latent],
    *,
    facts: Mapping[str, str] | None = None,
    density: Float[np.ndarray, " d_sae"] | None = None,
) -> None:
    """Write the page; `facts` are shown at its head, `density` of all latents as a histogram."""
    page = render(title, latents, facts=facts, density=density)
    files.make_directory(Path(path).parent)
    files.commit(Path(path), page.encode("utf-8", "backslashreplace"))  # a token may be half a character


def render(
    title: str,
    latents: Sequence[Latent],
    *,
    facts: Mapping[str, str] | None = None,
    density: Float[np.ndarray, " d_sae"] | None = None,
) -> str:
    """The page as text."""
    _check(latents)
    overview = "" if density is None else _density_figure(density)
    cards = "".join(_card(latent) for latent in sorted(latents, key=lambda latent: -latent.density))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{_escape(title)}</h1>{_facts(facts or {})}{overview}</header>"
        f"{_index(latents)}<main>{cards}</main></body></html>\n"
    )


def _check(latents: Sequence[Latent]) -> None:
    for latent in latents:
        for example in latent.examples:
            where = f"latent {latent.index}, example {example.title!r}"
            if len(example.tokens) != len(example.activations):
                found = f"{len(example.tokens)} tokens and {len(example.activations)} activations"
                raise InputError(f"{where}: found {found}, expected as many")
            if not all(np.isfinite(each.activations).all() for each in (example, *example.grids)):
                raise InputError(f"{where}: found NaN or infinity, expected finite activations")
            for grid in example.grids:
                if grid.cells.shape != grid.activations.shape:
                    raise InputError(
                        f"{where}: grid {grid.title!r}: found {grid.cells.shape} cells, expected as many values"
                    )
                if grid.cells.size and not (grid.cells.min() >= 0 and grid.cells.max() < len(COLOURS)):
                    raise InputError(f"{where}: grid {grid.title!r}: found colour {grid.cells.max()}, expected 0 to 9")


def _escape(text: str) -> str:
    """Text that is safe in HTML; control characters are spelled out."""
    shown = {"\n": "↵", "\t": "→"}
    plain = "".join(shown.get(each, each if ord(each) >= 32 else f"\\x{ord(each):02x}") for each in str(text))
    return html.escape(plain, quote=True)


def _percent(density: float) -> str:
    """In percent whatever its size, with two digits that count."""
    if density == 0:
        return "dead"
    digits = max(0, 1 - math.floor(math.log10(100 * density)))
    return f"{100 * density:.{digits}f} %"


def _index(latents: Sequence[Latent]) -> str:
    """A table that sorts by style: each row carries its place under every order."""
    orders = {
        "density": lambda latent: -latent.density,
        "peak": lambda latent: -latent.peak,
        "number": lambda latent: latent.index,
    }
    places = {
        name: {latent.index: place for place, latent in enumerate(sorted(latents, key=key))}
        for name, key in orders.items()
    }
    choices = "".join(
        f'<label><input type="radio" name="order" id="by-{name}"{" checked" * (name == "density")}>{name}</label>'
        for name in orders
    )
    rows = "".join(
        f'<a class="row" href="#latent-{latent.index}" style="'
        + ";".join(f"--{name}:{places[name][latent.index]}" for name in orders)
        + f'"><b>{latent.index}</b><span>{_percent(latent.density)}</span><span>{latent.peak:.3g}</span>'
        f"<span>{_histogram(latent.histogram, 90, 18)}</span><span>{_tokens_promoted(latent.promoted[:5])}</span></a>"
        for latent in sorted(latents, key=orders["density"])
    )
    columns = ("density", "peak", "values", "promotes")
    head = f'<div class="row head"><b>latent</b>{"".join(f"<span>{name}</span>" for name in columns)}</div>'
    heading = f"<h2>{len(latents)} latents <small>ordered by {choices}</small></h2>"
    return f'<nav>{heading}<div class="index">{head}{rows}</div></nav>'


def _card(latent: Latent) -> str:
    promoted = ""
    if latent.promoted or latent.suppressed:
        promoted = (
            f'<div class="logits"><div><h3>promotes</h3>{_tokens_promoted(latent.promoted)}</div>'
            f"<div><h3>suppresses</h3>{_tokens_promoted(latent.suppressed)}</div></div>"
        )
    examples = "".join(_example(example, latent.peak) for example in latent.examples)
    values = _histogram(latent.histogram, 260, 56, axis=True)
    facts = {"density": _percent(latent.density), "mean": f"{latent.mean:.3g}", "peak": f"{latent.peak:.3g}"}
    return (
        f'<article id="latent-{latent.index}"><h2><a href="#latent-{latent.index}">Latent {latent.index}</a></h2>'
        f'<div class="figures">{_facts(facts)}<figure>{values}<figcaption>values where it fires</figcaption></figure>'
        f"{promoted}</div>{examples or '<p>It fired on no example.</p>'}</article>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    pairs = (f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _tokens_promoted(tokens: Sequence[tuple[str, float]]) -> str:
    return " ".join(f'<code title="{logit:+.3g}">{_escape(token).replace(" ", "·")}</code>' for token, logit in tokens)


def _example(example: Example, peak: float) -> str:
    grids = f'<div class="grids">{"".join(_grid(grid, peak) for grid in example.grids)}</div>' if example.grids else ""
    top = float(np.max(example.activations, initial=0))
    return (
        f'<section><h3>{_escape(example.title)} <small>{top:.3g}</small></h3><div class="example">'
        f'{grids}<p class="text">{_text(example, peak)}</p></div></section>'
    )


def _text(example: Example, peak: float) -> str:
    """The tokens around the peak, shaded by activation; a line break is shown and kept."""
    if not len(example.tokens):
        return ""
    centre = int(np.argmax(example.activations))
    start, stop = max(0, centre - CONTEXT), min(len(example.tokens), centre + CONTEXT + 1)
    parts = ["…"] if start else []
    for token, value in zip(example.tokens[start:stop], example.activations[start:stop], strict=True):
        shown = _escape(token).replace("↵", "↵\n")
        if value > 0:
            shade = max(0.12, float(value) / peak)  # the weakest firing is still seen
            parts.append(f'<mark style="--a:{shade:.2f}" title="{_escape(token)} {value:.3g}">{shown}</mark>')
        else:
            parts.append(shown)
    return "".join(parts) + ("…" if stop < len(example.tokens) else "")


def _grid(grid: Grid, peak: float) -> str:
    """Cells in their colours, faded where the latent is silent; a dot's area is the activation.

    One path for each colour and each of LEVELS dot sizes keeps a page of thousands of grids small enough to open.
    """
    rows, cols = grid.cells.shape
    runs: dict[tuple[int, bool], list[str]] = {}
    for row in range(rows):
        kinds = [(int(colour), bool(on)) for colour, on in zip(grid.cells[row], grid.activations[row] > 0, strict=True)]
        start = 0
        for kind, run in itertools.groupby(kinds):
            length = len(list(run))
            runs.setdefault(kind, []).append(f"M{start} {row}h{length}v1h-{length}z")
            start += length
    drawn = [
        f'<path fill="{COLOURS[colour]}"{"" if on else FADED} d="{"".join(parts)}"/>'
        for (colour, on), parts in sorted(runs.items())
    ]
    lines = [f"M0 {row}h{cols}" for row in range(1, rows)] + [f"M{col} 0v{rows}" for col in range(1, cols)]
    drawn.append(f'<path class="lines" d="{"".join(lines)}"/>')
    dots: dict[int, list[str]] = {}
    for row, col in np.argwhere(grid.activations > 0):
        level = max(1, min(LEVELS, math.ceil(LEVELS * grid.activations[row, col] / max(peak, 1e-30))))
        dots.setdefault(level, []).append(f"M{col}.5 {row}.5h0")
    for level, places in sorted(dots.items()):
        size, where = 0.78 * math.sqrt(level / LEVELS), "".join(places)
        drawn.append(f'<path class="rim" stroke-width="{size + 0.14:.2f}" d="{where}"/>')
        drawn.append(f'<path class="dot" stroke-width="{size:.2f}" d="{where}"/>')
    cell = max(6, min(18, 220 // max(rows, cols, 1)))
    size = f'width="{cols * cell}" height="{rows * cell}" viewBox="0 0 {cols} {rows}"'
    caption = f"<figcaption>{_escape(grid.title)}</figcaption>"
    return f'<figure><svg class="grid" {size}>{"".join(drawn)}</svg>{caption}</figure>'


def _histogram(counts: np.ndarray, width: int, height: int, axis: bool = False) -> str:
    """Bars over the occupied part of survey.EDGES, which are logarithmic."""
    occupied = np.flatnonzero(counts)
    if not len(occupied):
        return f'<svg width="{width}" height="{height}"></svg>'
    first, last = int(occupied[0]), int(occupied[-1]) + 1
    return _bars(counts[first:last], f"{EDGES[first]:.2g}", f"{EDGES[last]:.2g}", width, height, axis)


def _density_figure(density: np.ndarray) -> str:
    """How many latents fire how often, on a logarithmic scale; dead ones are counted apart."""
    live = np.log10(density[density > 0])
    dead, dense = int(np.sum(density == 0)), int(np.sum(density > 0.1))
    low = float(np.floor(live.min())) if len(live) else -1.0
    counts, _ = np.histogram(live, bins=40, range=(min(low, -1.0), 0.0))
    bars = _bars(counts, f"{10 ** min(low, -1.0):.0e}", "1", 520, 90, axis=True)
    caption = f"density of all {len(density)} latents: {dead} dead, {dense} fire on more than a tenth of tokens"
    return f"<figure>{bars}<figcaption>{caption}</figcaption></figure>"


def _bars(counts: np.ndarray, low: str, high: str, width: int, height: int, axis: bool) -> str:
    floor = height - 14 if axis else height
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{place * step:.1f}" y="{floor * (1 - count / counts.max()):.1f}" width="{max(step - 1, 0.5):.1f}" '
        f'height="{floor * count / counts.max():.1f}"><title>{count}</title></rect>'
        for place, count in enumerate(counts)
        if count
    )
    ends = ((0, "start", low), (width, "end", high)) if axis else ()
    labels = "".join(f'<text x="{x}" y="{height - 2}" text-anchor="{end}">{text}</text>' for x, end, text in ends)
    return f'<svg class="bars" width="{width}" height="{height}" viewBox="0 0 {width} {height}">{bars}{labels}</svg>'


STYLE = """
:root{--ink:#1c1b19;--soft:#6d6a64;--paper:#faf9f6;--card:#fff;--line:#e4e1da;--hot:226,88,34}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:28px 24px 80px;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:26px;margin:0 0 10px}h2{font-size:19px;margin:0 0 10px}h3{font-size:13px;margin:0 0 6px}
h2 a{color:inherit;text-decoration:none}small{color:var(--soft);font-weight:400;font-size:13px}
dl{display:flex;flex-wrap:wrap;gap:6px 26px;margin:0 0 16px}dt{color:var(--soft);font-size:12px}
dd{margin:0;font-weight:600}
figure{margin:0}figcaption{color:var(--soft);font-size:12px}
.bars rect{fill:rgb(var(--hot))}.bars text{font-size:10px;fill:var(--soft)}
nav,article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:20px}
nav label{margin-left:10px;cursor:pointer}nav input{vertical-align:-1px;margin-right:4px}
.index{display:flex;flex-direction:column;max-height:420px;overflow:auto}
.row{display:grid;grid-template-columns:80px 80px 80px 120px 1fr;align-items:center;gap:8px;padding:3px 6px;
 color:inherit;text-decoration:none;border-top:1px solid var(--line);order:var(--density)}
.row:hover{background:#f4f1ea}.row>*{overflow:hidden;white-space:nowrap;text-overflow:ellipsis}
.head{order:-1;position:sticky;top:0;background:var(--card);color:var(--soft);font-size:12px;border:0}
body:has(#by-peak:checked) .row:not(.head){order:var(--peak)}
body:has(#by-number:checked) .row:not(.head){order:var(--number)}
.figures{display:flex;flex-wrap:wrap;gap:14px 34px;align-items:flex-start;margin-bottom:6px}
.logits{display:flex;gap:28px;flex:1;min-width:340px}.logits>div{flex:1}
code{font:12.5px/1.7 ui-monospace,Menlo,Consolas,monospace;background:#f1eee7;border-radius:4px;padding:1px 5px;
 white-space:pre}
section{border-top:1px solid var(--line);padding:12px 0 4px}
.example{display:flex;flex-wrap:wrap;gap:8px 26px;align-items:flex-start;margin-bottom:8px}
.example .text{flex:1;min-width:320px}.grids{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-end;max-width:100%}
.grid{display:block;background:#fff;outline:1px solid var(--line)}
.grid path{shape-rendering:crispEdges}
.grid .lines{stroke:#fff;stroke-opacity:.35;stroke-width:.05;fill:none}
.grid .rim,.grid .dot{stroke:#111;stroke-linecap:round;shape-rendering:auto}.grid .dot{stroke:#fff}
.text{font:13px/1.75 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
mark{color:inherit;background:rgba(var(--hot),var(--a));border-radius:3px}
:target{border-color:rgb(var(--hot))}
"""
