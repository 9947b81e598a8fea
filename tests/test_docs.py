"""Pages keep their word: words are defined, what is shown beside other libraries runs."""

import ast
import collections
import dataclasses
import functools
import importlib
import itertools
import json
import re
from pathlib import Path

import pytest

from test_repository import DOCS, PAGES, blocks, prose, read

ROOT = Path(__file__).parent.parent
READ = [page for page in PAGES if page not in ("docs/LOG.md", "docs/tree.md", "docs/glossary.md")]
ARRAYS = re.compile(r"(Float|Int|Bool|Num|Shaped|UInt|Integer|Inexact)\d*")
OFTEN = 5  # annotations
# words that mean something of their own here: where one is used, the glossary has it
WORDS = (
    "attempt", "attribution", "augmentation", "AuxK", "beam", "bucket", "buffer", "budget", "capture", "carry",
    "checkpoint", "collective", "completeness", "control", "crosscoder", "cursor", "dead", "density", "dictionary",
    "digest", "edit", "encoder", "error term", "F1", "family", "feature", "filler", "fired", "floor", "form", "free",
    "frozen", "FVU", "grid", "held out", "influence", "item", "L0", "latent", "logit lens", "LoRA", "master weights",
    "MCC", "member", "mesh", "nat", "patch", "place", "plan", "prefill", "probe", "produced", "pruned", "recovered",
    "remat", "replacement", "rescored", "sample", "shard", "share", "sidecar", "sink", "skip transcoder", "slot",
    "source", "splice", "store", "sweep", "tap", "threshold", "transcoder", "variant", "view",
)  # fmt: skip


def defined() -> set[str]:
    """The terms of the glossary's first columns."""
    rows = re.findall(r"^\| ([^|]+) \|", read("docs/glossary.md"), re.MULTILINE)
    return {term.strip("` ") for row in rows for term in re.split(r", |; ", row.replace("(", ", ").replace(")", ""))}


def dimensions() -> collections.Counter[str]:
    """How many annotations of arrays use each name of an axis."""
    found: collections.Counter[str] = collections.Counter()
    for top in ("qwen_eqx", "arc", "sae", "experiments/qwen_lab"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Subscript) and ARRAYS.fullmatch(ast.unparse(node.value)):
                    spelled = [leaf for leaf in ast.walk(node.slice) if isinstance(leaf, ast.Constant)]
                    for leaf in spelled[-1:]:
                        found.update(re.findall(r"[a-z]\w*", str(leaf.value)))
    return found


def test_every_axis_that_annotations_name_often_is_in_the_glossary():
    often = {name for name, count in dimensions().items() if count >= OFTEN}
    assert {"batch", "seq", "d_model"} <= often
    assert not often - defined(), "docs/glossary.md lacks names of axes"


def test_every_word_of_ours_is_in_the_glossary_and_on_some_page():
    terms = {term.lower() for term in defined()}
    assert not {word for word in WORDS if word.lower() not in terms}, "docs/glossary.md lacks words"
    text = "\n".join(read(page) for page in [*READ, "docs/glossary.md"])
    unused = [word for word in WORDS if not re.search(rf"\b{re.escape(word)}", text, re.IGNORECASE)]
    assert not unused, "no page uses these words"


def test_every_word_that_a_page_sets_in_italics_is_in_the_glossary():
    """Italics mark a term where it is explained; longer ones are notes of where figures come from."""
    terms = {term.lower() for term in defined()}
    for page in READ:
        text = "\n".join(line for _, line in prose(page))
        for term in re.findall(r"(?<![*\w])\*([^*\n`]{3,30})\*(?![*\w])", text):
            if len(term.split()) <= 3:
                assert term.lower().rstrip(".,:") in terms, f"{page}: *{term}* is not in docs/glossary.md"


def test_a_term_is_defined_once():
    rows = re.findall(r"^\| ([^|]+) \|", read("docs/glossary.md"), re.MULTILINE)
    heads = [row for row in rows if row not in ("name", "term", "kind", "---")]
    assert len(heads) == len(set(heads))


def ours() -> list[tuple[str, str]]:
    """(what, code) of the last column of the table of ten things."""
    found = []
    for line in read("docs/coming_from.md").splitlines():
        if line.startswith("| ") and "`" in line:
            row = line.strip("| ").split(" | ")
            assert len(row) == 5, f"found {len(row)} columns: {line[:60]}"
            found += [(row[0], code) for code in re.findall(r"`([^`]+)`", row[4])]
    return found


def test_what_is_shown_beside_other_libraries_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert len(dict(ours())) == 10
    names = {"__name__": "example"}
    for block in blocks("docs/coming_from.md", "python"):
        exec(compile(block, "docs/coming_from.md", "exec"), names)
    for what, code in ours():
        exec(compile(code, f"docs/coming_from.md: {what}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in DOCS if page != "docs/tree.md"])
def test_figures_that_were_superseded_say_by_what(page: str):
    for paragraph in re.split(r"\n\s*\n", read(page)):
        if re.search(r"\bsuperseded\b", paragraph) and not re.search(r"A later\s+entry never rewrites", paragraph):
            assert re.search(r"superseded\s+by\W", paragraph), f"{page}: {paragraph[:80]}"


@pytest.mark.parametrize("page", PAGES)
def test_a_table_begins_after_a_blank_line(page: str):
    """The site's Markdown makes no table of one that follows a line of text."""
    lines = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL).splitlines()
    for before, line in itertools.pairwise(lines):
        assert not line.startswith("|") or before.startswith("|") or not before.strip(), f"{page}: {line[:60]}"


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, command, flags) of every command that a page or a notebook shows."""
    shown = {
        page: read(page) for page in [*PAGES, "experiments/README.md"] if page not in ("docs/LOG.md", "docs/tree.md")
    }
    for path in (ROOT / "docs").rglob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        shown[path.name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = []
    for page, text in shown.items():
        for name, rest in re.findall(r"python experiments/(\w+)\.py((?:[^\n`|;#]|\\\n)*)", text):
            found.append((page, name, re.findall(r"(?<=\s)--([\w.-]+)", " " + rest.replace("\\\n", " "))))
    return found


def test_flags_of_commands_exist():
    seen = 0
    for page, name, flags in commands():
        if name in ("NAME", "pipeline") or not flags:
            continue  # any command; its flags are its stages'
        known = {field.name.replace("_", "-") for field in dataclasses.fields(config_of(name))}
        for flag in flags:
            assert flag in {"help", *known, *(f"no-{each}" for each in known)}, f"{page}: {name}.py has no --{flag}"
            seen += 1
    assert seen > 50


@functools.cache
def config_of(name: str) -> type:
    """The dataclass of a command's flags, which `cli.run` is given."""
    calls = ast.walk(ast.parse((ROOT / "experiments" / f"{name}.py").read_text()))
    (given,) = {
        ast.unparse(call.args[1])
        for call in calls
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "cli.run"
    }
    return getattr(importlib.import_module(name), given)
