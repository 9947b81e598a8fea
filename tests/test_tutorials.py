"""Every notebook runs from its first cell to its last, what it claims holds, and its saved outputs are whole and small."""

import json
import os
import re
from pathlib import Path

import jax
import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("IPython")
pyplot = pytest.importorskip("matplotlib.pyplot")

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.ipynb"))
TUTORIALS = [name for name in NOTEBOOKS if name.startswith("tutorials/")]
LINES, COLUMNS = 40, 120  # of a screen
LARGEST = 200_000  # bytes of a notebook


def cells(name: str, kind: str) -> list:
    return [cell for cell in nbformat.read(DOCS / name, as_version=4).cells if cell.cell_type == kind]


def shown(output) -> str:
    """The text of an output, a line that was written over as it stood last."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In this process: a kernel for each would import and compile everything again. Claims are assertions in cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # one asks for devices: they are there, and it is undone
    pyplot.switch_backend("agg")
    names = {"__name__": "notebook"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a reader has it
        for number, cell in enumerate(cells(name, "code"), 1):
            exec(compile(cell.source, f"{name}, cell {number}", "exec"), names)
    pyplot.close("all")
    assert list(tmp_path.iterdir()) == []  # what it writes goes to a temporary directory


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_was_run_and_says_nothing_of_a_machine(name: str):
    nbformat.validate(nbformat.read(DOCS / name, as_version=4))
    assert (DOCS / name).stat().st_size < LARGEST
    code = cells(name, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for number, cell in enumerate(code, 1):
        for output in cell.outputs:
            assert output.output_type in ("stream", "execute_result", "display_data"), f"cell {number}"
            lines = shown(output).splitlines()
            assert sum(max(1, -(-len(line) // COLUMNS)) for line in lines) <= LINES, f"cell {number}"  # long ones wrap
            assert not re.search("/tmp|/home|Warning", json.dumps(output)), f"cell {number}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name: str):
    text = "\n".join(cell.source for cell in cells(name, "markdown"))
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (DOCS / name).parent.joinpath(link).exists(), f"{name}: {link} does not exist"


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_short_ends_with_a_finding_and_has_a_picture(name: str):
    whole = nbformat.read(DOCS / name, as_version=4).cells
    assert 10 <= len(whole) <= 24
    headings = re.findall(r"^## (.*)$", "\n".join(cell.source for cell in whole), re.MULTILINE)
    assert headings[-1] == "What was found"
    assert "assert " in "\n".join(cell.source for cell in cells(name, "code"))
    kinds = {kind for cell in cells(name, "code") for output in cell.outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_is_reached(name: str):
    """From the README, from the start page, and in the site's contents, where it is a page."""
    root = DOCS.parent
    assert f"](docs/{name})" in (root / "README.md").read_text()
    assert f"]({name})" in (DOCS / "index.md").read_text()
    nav = (root / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    assert f": {name.removesuffix('.ipynb')}.md\n" in nav


def test_the_tour_goes_through_all_of_it():
    headings = [cell.source.partition("\n")[0] for cell in cells("tour.ipynb", "markdown") if cell.source[0] == "#"]
    steps = ["Capture", "Patch", "Probe", "Train a dictionary", "Steer", "Read a store"]
    assert headings == ["# A tour", *(f"## {step}" for step in steps)]
