"""The page of a run of several commands: what each made, its main numbers and pictures; one file that fetches nothing."""

import base64
import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sae
from arc.files import read_json
from qwen_lab import figures

LARGEST_PICTURE = 2_000_000  # bytes; a larger one is a link alone
RULES = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.7em 0; }
td, th { padding: 0.15em 1.2em 0.15em 0; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #999; } tr + tr td { border-top: 1px solid #eee; } td.n, th.n { text-align: right; }
dl { display: flex; flex-wrap: wrap; gap: 0.4em 2em; } dt { color: #6d6a64; font-size: 12px; } dd { margin: 0; }
pre { background: #f4f4f4; padding: 0.6em; overflow-x: auto; } img { max-width: 100%; }
h2 { margin-top: 2em; border-top: 1px solid #ccc; padding-top: 0.6em; } summary { cursor: pointer; color: #345; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page shows of a stage; `rows` are those of a table, with the same columns each."""

    name: str
    said: str  # what became of it in this run
    out: Path
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: Sequence[Mapping[str, str]] = ()


def section(name: str, said: str, out: Path) -> Section:
    """Of a stage that wrote there; what is not there is not shown."""
    numbers, rows = _READERS[name](out) if out.is_dir() else ({}, [])
    return Section(name, said, out, numbers, rows)


def _transformed(out: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    said = object_in(out / "summary.json")
    return {name: f"{said[name]:,}" for name in ("tasks", "duplicates", "skipped") if name in said}, []


def _stored(out: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    if not (out / "manifest.json").exists():
        return {}, []
    store = sae.ActivationStore.open(out)
    said = Counter(str(item.get("outcome")) for item in store.items.values() if "outcome" in item)
    numbers = {
        "model": store.manifest.model_id,
        "items": f"{len(store.items):,}",
        "rows": f"{len(store):,}",
        "sites": f"{', '.join(store.sites)}, {store.manifest.d_model} wide",
        "answers": ", ".join(f"{count:,} {name}" for name, count in said.most_common()),
    }
    return {name: value for name, value in numbers.items() if value}, []


def _measured(out: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    found = {name: row for name, row in object_in(out / "metrics.json").items() if isinstance(row, dict)}
    rows = [
        {"dictionary": name, "form": str(row.get("form", ""))} | figures.written(row) for name, row in found.items()
    ]
    first = next(iter(found.values()), {})
    told = {"rows": first.get("rows_of"), "site": first.get("site")}
    filled = [{name: value for name, value in row.items() if value} for row in rows]
    return {name: str(value) for name, value in told.items() if value}, filled


_READERS = {"transform": _transformed, "extract": _stored, "train": _measured, "evaluate": _measured}


def object_in(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where there is none, or no object."""
    found = read_json(path) if path.exists() else {}
    return found if isinstance(found, dict) else {}


def page(out: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section], recipe: str) -> str:
    """The whole HTML page, to lie in `out`: links are relative, so that the directory may be moved."""
    heads = [f'<tr><td><a href="#{s.name}">{s.name}</a></td><td>{escape(s.said)}</td></tr>' for s in sections]
    parts = [
        f"<h1>{escape(title)}</h1>{_facts(facts)}",
        f"<table><tr><th>stage</th><th></th></tr>{''.join(heads)}</table>",
        *(_shown(out, each) for each in sections),
        "<h2>Again</h2><p>These flags repeat it: ",
        f"{_link(out, out / 'pipeline.toml')}, with <code>--config</code> and another <code>--out</code>.</p>",
        f"<details><summary>pipeline.toml</summary><pre>{escape(recipe)}</pre></details>",
    ]
    meta = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{RULES}">'
    head = f"{meta}<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(parts)}</body></html>\n'


def _shown(out: Path, section: Section) -> str:
    parts = [f'<h2 id="{section.name}">{section.name}</h2><p>{escape(section.said)}</p>', _facts(section.numbers)]
    if section.rows:
        names = list(dict.fromkeys(name for row in section.rows for name in row))
        kinds = ["" if name in ("dictionary", "form") else ' class="n"' for name in names]
        parts.append(_table(names, kinds, section.rows))
    if not section.out.is_dir():
        return "".join(parts)
    for report in sorted(section.out.glob("**/features/index.html")):
        parts.append(f"<p>What each latent fires on: {_link(out, report)}</p>")
    for picture in sorted(section.out.glob("*.svg")):
        parts.append(_picture(picture))
    files = "".join(f"<li>{line}</li>" for line in _listed(out, section.out))
    return "".join([*parts, f"<details><summary>files</summary><ul>{files}</ul></details>"])


def _table(names: Sequence[str], kinds: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(zip(names, kinds, strict=True))
    lines = ["".join(f"<th{kind}>{escape(name)}</th>" for name, kind in columns)]
    lines += ["".join(f"<td{kind}>{escape(row.get(name, ''))}</td>" for name, kind in columns) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _facts(facts: Mapping[str, str]) -> str:
    pairs = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _picture(path: Path) -> str:
    """As an image inside the page: a script in it would not run."""
    data = path.read_bytes()
    if len(data) > LARGEST_PICTURE:
        return ""
    return f'<img alt="{escape(path.name)}" src="data:image/svg+xml;base64,{base64.b64encode(data).decode()}">'


def _listed(out: Path, directory: Path) -> list[str]:
    """A line for everything that lies directly in a directory; of one inside, how much it holds."""
    lines = []
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        inside = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        size = sum(each.stat().st_size for each in inside)
        many = f"{len(inside):,} files, " if path.is_dir() else ""
        lines.append(f"{_link(out, path)} {many}{size:,} bytes")
    return lines


def _link(out: Path, path: Path) -> str:
    place = os.path.relpath(path, out).replace(os.sep, "/")
    return f'<a href="{escape(quote(place), quote=True)}">{escape(place)}</a>'


def facts_of(out: Path) -> dict[str, str]:
    """What the run says of itself: device, versions and revision."""
    run = object_in(out / "run.json")
    versions = run.get("versions", {})
    said = {
        "command": " ".join(map(str, run.get("command", []))),
        "device": run.get("device"),
        "git revision": run.get("git_revision"),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("jax", "equinox") if name in versions),
    }
    return {name: str(value) for name, value in said.items() if value}
