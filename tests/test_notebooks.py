"""What a notebook shows: HTML that balances, of bounded size, whatever the value holds; a bar that stays one line."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arc
import qwen_eqx
import sae
import strategies
from arc.drawing import PALETTE
from markup import Read
from qwen_lab import Dictionary, Place
from qwen_lab.circuits.graph import Graph
from qwen_lab.circuits.influence import Edges
from qwen_lab.circuits.nodes import FEATURE, LOGIT, TOKEN, Features, Nodes
from sae.data.shards import Shard
from test_reprs import GRID, MANIFEST, SHOWN, TASK, dictionary

EVIL = '<script>alert("1")</script>&\x00\n' * 99
NUMBERS = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
SKELETONS = ("dictionary of booleans", "skeleton of a dictionary")


def drawn(value: Any, most: int = 20_000) -> Read:
    """Its HTML, read."""
    html = value._repr_html_()
    assert len(html) <= most
    assert "<script" not in html
    return Read(html)


@pytest.mark.parametrize("name", [*sae.FORMS, *SKELETONS, "store", "task"])
def test_what_has_a_short_repr_has_a_table_too(name: str):
    make, _ = SHOWN[name]
    read = drawn(make())
    assert read.every("table") or read.every("svg")


def test_every_form_shows_itself_by_the_contract_alone():
    assert all("_repr_html_" not in vars(form) for form in sae.FORMS.values())
    assert "parameters" in drawn(dictionary("topk")).text


@given(strategies.grids())
@settings(max_examples=30)
def test_a_grid_is_drawn_cell_for_cell(grid: arc.Grid):
    read = drawn(grid)
    (svg,) = read.every("svg")
    assert svg["aria-label"] == f"{grid.shape[0]} by {grid.shape[1]} cells: " + ", ".join(
        "".join(map(str, row)) for row in grid.tolist()
    )
    painted = np.full(grid.shape, 255, np.uint8)
    for path in read.every("path"):
        if path["fill"] != "none":
            colour = PALETTE.index(str(path["fill"]))
            for run in str(path["d"]).split("M")[1:]:
                col, row = map(int, run.partition("h")[0].split())
                painted[row, col : col + int(run.partition("h")[2].partition("v")[0])] = colour
    assert np.array_equal(painted, grid)


def test_a_grid_stays_an_array():
    grid = arc.as_grid([[1, 2], [3, 4]])
    assert type(grid + 1) is type(grid == grid) is np.ndarray
    assert type(grid.max()) is np.uint8
    assert repr(grid) == "array([[1, 2],\n       [3, 4]], dtype=uint8)"
    for other in (grid[0], grid.astype(np.int64), grid[:0]):
        assert getattr(other, "_repr_html_")() is None  # noqa: B009  (no grid: the plain text is shown)
    assert jnp.asarray(grid).dtype == jnp.uint8


@given(strategies.tasks(max_side=4))
@settings(max_examples=10)
def test_a_task_shows_all_its_grids(task: arc.Task):
    assert len(drawn(task).every("svg")) == 2 * (len(task.train) + len(task.test))
    assert len(drawn(task.train[0]).every("svg")) == 2


def test_a_task_of_any_size_is_bounded_and_its_name_is_a_text():
    rng = np.random.default_rng(0)
    pair = arc.Pair(*(arc.as_grid(rng.integers(0, 10, (30, 30))) for _ in range(2)))
    task = arc.Task(EVIL, (pair,) * 500, (arc.Pair(GRID),))
    read = drawn(task, 500_000)
    assert "489 pairs more" in read.text
    assert "<script>" in read.text
    drawn(arc.data.Tasks([task] * 500, [EVIL]), 200_000)
    drawn(arc.data.Tasks())
    assert "?" in drawn(TASK.test[0]).text


def generation(tokens: np.ndarray, lengths: np.ndarray, log_probs: np.ndarray) -> qwen_eqx.Generation:
    return qwen_eqx.Generation(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(log_probs), None, None)


@given(st.integers(0, 12), st.integers(0, 70), st.data())
@settings(max_examples=20)
def test_a_generation_is_shown_whatever_it_holds(batch: int, new: int, data: st.DataObject):
    log_probs = np.full((batch, new), data.draw(NUMBERS), np.float32)
    tokens = np.arange(batch * new, dtype=np.int32).reshape(batch, new)
    lengths = np.full(batch, data.draw(st.integers(0, new)), np.int32)
    read = drawn(generation(tokens, lengths, log_probs), 60_000)
    assert len(read.every("span")) == min(batch, 8) * min(int(lengths.max(initial=0)), 48)
    for row in range(min(batch, 1)):
        drawn(qwen_eqx.Completion(0, 0, 3, new, tokens[row], log_probs[row], None, None))


def test_a_generation_without_numbers_is_shown_as_text():
    made = generation(np.zeros((2, 3), np.int32), np.zeros(2, np.int32), np.zeros((2, 3), np.float32))
    assert jax.eval_shape(lambda: made)._repr_html_() is None
    assert jax.tree.map(lambda _: True, made)._repr_html_() is None
    drawn(qwen_eqx.Found((np.arange(3, dtype=np.int32),), np.full(1, math.nan, np.float32)))


def test_texts_of_a_store_and_of_metadata_are_texts():
    manifest = dataclasses.replace(MANIFEST, model_id=EVIL, sites=(EVIL,) * 40)
    items = tuple({"item": n, "outcome": f"{EVIL}{n}"} for n in range(100))
    shard = Shard(0, Path("x"), 77, 9000, "sha256:0", items)
    read = drawn(sae.ActivationStore(Path(EVIL), manifest, (shard,), manifest.sites))
    assert "<script>" in read.text
    told = {f"{EVIL}{n}": EVIL * 9 for n in range(99)}
    drawn(Dictionary(EVIL, dictionary("topk"), Place((EVIL,), (EVIL,)), told), 40_000)


def graph(features: int, influence: float) -> Graph:
    """Features at the last of two tokens, and one logit."""
    kinds = np.asarray([FEATURE] * features + [TOKEN, TOKEN, LOGIT])
    columns = {field.name: np.zeros(len(kinds), np.float32) for field in dataclasses.fields(Nodes)}
    whole = {name: np.arange(len(kinds)) for name in ("layer", "position", "index")}
    told = {"kind": kinds, "influence": np.full(len(kinds), influence, np.float32)}
    none = np.zeros(0, np.int32)
    edges, fired = Edges(none, none, np.zeros(0, np.float32)), Features(none, none, none, np.zeros(0, np.float32))
    facts = {"model": EVIL, "logit_tokens": {str(features + 2): EVIL}, "completeness_score": math.nan}
    return Graph([1, 2], [EVIL, "b"], Nodes(**(columns | whole | told)), edges, fired, facts)


@given(st.integers(0, 99), NUMBERS)
@settings(max_examples=10)
def test_a_graph_says_its_answer_and_its_strongest_features(features: int, influence: float):
    read = drawn(graph(features, influence))
    assert "says" in read.text
    assert read.text.count("influence ") == min(features, 8)


CELLS = (
    """
import time
from qwen_lab import cli
for _ in cli.progress(range(9), 9, "work", "steps"):
    time.sleep(0.05)
""",
    """
from qwen_eqx.generation import progress
line = progress._Line()
for tokens in (1, 2, 3):
    line.shown = 0  # long ago
    line.show(progress.Progress(tokens, 0, 1, tokens, 9, 1.0))
line.close()
""",
)


def test_in_a_notebook_a_bar_is_one_line_that_is_written_over():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", coalesce_streams=True).execute()
    bar, line = (cell.outputs for cell in notebook.cells)
    assert [output.output_type for output in bar] == ["display_data"]
    assert bar[0].data["text/plain"].startswith("work")
    assert "9/9 steps" in bar[0].data["text/plain"]
    assert [output.name for output in line] == ["stderr"]
    assert line[0].text.count("\n") == 1
    assert "3 tokens" in line[0].text.rpartition("\r")[2]
