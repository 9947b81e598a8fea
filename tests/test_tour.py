"""The notebook runs from its first cell to its last, and nothing that it shows is longer than a screen."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"
LINES, COLUMNS = 40, 120  # of a screen


def shown(output) -> str:
    """The text of an output, a line that was written over as it stood last."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def check_outputs(notebook) -> None:
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            assert output.output_type in ("stream", "execute_result"), f"cell {number}: {output.output_type}"
            lines = shown(output).splitlines()
            assert sum(max(1, -(-len(line) // COLUMNS)) for line in lines) <= LINES, f"cell {number}"  # long ones wrap


def test_the_notebook_runs_and_shows_no_more_than_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'experiments'}")  # as installed
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
        coalesce_streams=True,
    )
    client.execute()
    check_outputs(notebook)
    assert list(tmp_path.iterdir()) == []  # what it writes goes to a temporary directory


def test_what_is_committed_was_run_and_says_nothing_of_a_machine():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) == len(code)
    assert not [shown(output) for cell in code for output in cell.outputs if re.search("/tmp|/home", shown(output))]
    headings = [cell.source.partition("\n")[0] for cell in notebook.cells if cell.source.startswith("#")]
    steps = ["Capture", "Patch", "Probe", "Train a dictionary", "Steer", "Read a store"]
    assert headings == ["# A tour", *(f"## {step}" for step in steps)]
