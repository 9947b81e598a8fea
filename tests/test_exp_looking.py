"""Pages that people look at, in a real browser: a solved run's cards and filters, an answer as it is computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arc
import strategies
from browsing import Open
from markup import Read
from qwen_lab import InputError, solve_report, timelines
from qwen_lab.predictions import Line
from qwen_lab.timelines import Timeline
from solving import made_task
from test_notebooks import graph

TASK = made_task("a")
EVIL = '<img src=x onerror="document.title=1">'


# ------------------------------------------------------------------------------------------------- a solved run


def solved(tasks: list[arc.Task], right: int) -> str:
    """The page of a run that has the first `right` tasks right, the others wrong; of four completions one has no grid."""
    chosen, lines, samples = {}, [], []
    views = arc.augment.sample_many(np.random.default_rng(0), 4, pairs=2)
    for number, task in enumerate(tasks):
        several: list[Line] = []
        ranked = []
        for test, pair in enumerate(task.test):
            assert pair.output is not None
            grid = arc.as_grid(pair.output if number < right else (pair.output + 1) % 10)
            said = [answer(task, test, view, None if n == 3 else grid) for n, view in enumerate(views)]
            several += [fields for fields, _ in said]
            mine = [sample for _, sample in said if sample is not None]
            samples += mine
            ranked.append(arc.vote.by_count(mine))
        chosen[task.id], lines = ranked, [*lines, several]
    grids = {key: [[each.grid for each in ranked] for ranked in tests] for key, tests in chosen.items()}
    made = arc.submission.to_json(arc.submission.from_predictions(grids))
    return solve_report.page(f"a model {EVIL}", tasks, chosen, lines, arc.evaluate(samples, made, tasks), len(tasks))


def answer(task: arc.Task, test: int, view: arc.Augmentation, grid: arc.Grid | None) -> tuple[Line, arc.Sample | None]:
    text = EVIL if grid is None else arc.parse_encoder("rows(minimal)").encode(grid)
    fields = {"task": task.id, "test": test, "augmentation": str(view), "text": text, "tokens": 4, "log_prob": -1.0}
    fields |= {"outcome": "no grid" if grid is None else "answered", "detail": EVIL, "dropped_pairs": [0]}
    fields["grid"] = None if grid is None else grid.tolist()
    parsed = arc.parse.parse(text, "rows(minimal)", "")
    return fields, None if grid is None else arc.Sample(task.id, test, view, arc.Completion(text, -1.0), parsed, grid)


def run_of(count: int) -> list[arc.Task]:
    """Tasks of one and two test inputs; the last has long grids, and a name that must stay a text."""
    tasks = [made_task(f"t{number}", tests=1 + number % 2) for number in range(count - 1)]
    long = arc.as_grid(np.tile(np.arange(10, dtype=np.uint8), (12, 1)))
    return [*tasks, arc.Task(EVIL, (arc.Pair(long, long),) * 2, (arc.Pair(long, long),))]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("solved") / "report.html"
    path.write_text(solved(run_of(200), right=50), encoding="utf-8")
    return path


def test_cards_are_complete_without_a_script():
    html = solved(run_of(4), right=3)
    read = Read(html)
    cards = read.every("article")
    assert [card["data-state"] for card in cards] == ["solved"] * 3 + ["unsolved"]
    assert [card["data-side"] for card in cards] == ["3", "3", "3", "12"]
    assert {card["data-sure"] for card in cards} == {"0.7500"}
    assert "img" not in [tag for tag, _ in read.elements]
    assert len(read.every("script")) == 1
    assert len([figure for figure in read.every("svg") if "train" in str(figure["aria-label"])]) == 4 * 4
    assert EVIL in read.text
    assert html.count("75% agree") == 4


def test_cards_are_chosen_and_put_in_order(report: Path, browse: Open):
    with browse(report) as page:
        shown, form = page.locator("article:visible"), page.locator("#filters")
        assert page.text_content("#count") == "200 of 200 tasks"
        form.get_by_label("not solved").check()
        assert page.text_content("#count") == "150 of 200 tasks"
        form.get_by_label("longest side").select_option("10")
        assert page.text_content("#count") == "149 of 200 tasks"
        form.get_by_label("name").fill("T77")
        assert shown.count() == 1
        assert shown.first.get_attribute("id") == "task-t77"
        form.get_by_label("name").fill("")
        form.get_by_label("longest side").select_option("30")
        form.get_by_role("radio", name="all", exact=True).check()
        form.get_by_label("order").select_option("small")
        assert page.locator("article").last.get_attribute("data-side") == "12"
        form.get_by_label("order").select_option("asked")
        assert page.locator("article").first.get_attribute("id") == "task-t0"
        form.get_by_label("order").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "name"


@pytest.mark.parametrize("how", [{"dark": True}, {"width": 360}, {"java_script_enabled": False}])
def test_the_report_fits_every_window(report: Path, browse: Open, how: dict):
    with browse(report, **how) as page:
        assert page.locator("#filters").is_visible() == ("java_script_enabled" not in how)
        assert page.locator("article").first.locator("svg").first.is_visible()
        if "java_script_enabled" not in how:
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# ------------------------------------------------------------------------------------------------- an answer


def timeline(task: arc.Task, codes: np.ndarray, *, read: bool = True, extra: int = 1) -> Timeline:
    """The right answer of a task, a token a cell, then `extra` tokens; `codes` are cut to it."""
    truth = task.test[0].output
    assert truth is not None
    cells: list[tuple[int, int] | None] = [(row, col) for row, col in np.ndindex(*truth.shape)] if read else []
    cells += [None] * extra
    pieces = [EVIL if cell is None else str(truth[cell]) for cell in cells]
    rows = np.resize(codes, (len(cells), codes.shape[1]))
    shares = np.linspace(0.5, 1, len(cells)) if cells else np.zeros(0)
    outcome = "correct" if read else "no grid"
    return Timeline(task, 0, outcome, truth if read else None, pieces, cells, shares, *timelines.strongest(rows))


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 8), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_the_strongest_are_those_that_none_left_out_exceeds(steps: int, width: int, count: int, random):
    codes = np.asarray([[random.choice([0.0, 1.0, random.random()]) for _ in range(width)] for _ in range(steps)])
    order, values = timelines.strongest(codes, count)
    assert order.shape == values.shape == (steps, min(count, width))
    for row, chosen, kept in zip(codes, order, values, strict=True):
        assert np.array_equal(row[chosen], kept)
        assert np.array_equal(np.sort(row)[::-1][:count], kept)


def test_a_column_goes_to_what_stands_out_and_not_to_what_is_always_on():
    task = made_task("a")
    codes = np.full((7, 3), 0.0)
    codes[:, 0] = 9.0  # always on
    codes[4, 1] = codes[1, 2] = 5.0
    made = timeline(task, codes)
    assert timelines.lanes(made) == [0, 2, 1]
    assert timelines.lanes(made, 2) == [2, 1]


@given(strategies.tasks(max_side=3), st.booleans(), st.integers(0, 2), st.sampled_from([np.nan, np.inf, 0.0, 1.0]))
@settings(max_examples=15)
def test_a_page_is_whole_whatever_was_written(task: arc.Task, read: bool, extra: int, value: float):
    codes = np.zeros((5, 4))
    codes[1, 2], codes[3, 1] = value, 2.0
    made = timeline(task, codes, read=read, extra=extra)
    html = timelines.render(made, {EVIL: EVIL}, latent_page="x#{latent}", names={1: EVIL})
    page = Read(html)
    assert len([row for row in page.every("tr") if "data-step" in row]) == len(made.pieces)
    assert len(page.every("script")) == 2
    assert "img" not in [tag for tag, _ in page.elements]


@given(st.lists(st.text(max_size=6) | st.sampled_from(["index", "..", "answer-1", "a/b", "a"]), min_size=1, max_size=6))
@settings(max_examples=30)
def test_every_answer_has_a_file_of_its_own_here(ids: list[str]):
    made = [timeline(arc.Task(name, TASK.train, TASK.test), np.ones((2, 2))) for name in ids]
    names = timelines._file_names(made)
    assert len({*names, "index.html"}) == len(ids) + 1
    assert all(Path(name).name == name and name.endswith(".html") and name.isascii() for name in names)


def test_columns_of_different_lengths_are_refused():
    task = made_task("a")
    with pytest.raises(InputError, match=r"timeline of a: found \[2, 3\] steps"):
        Timeline(task, 0, "", None, ["", ""], [None] * 3, np.zeros(2), np.zeros((2, 1), int), np.zeros((2, 1)))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("answers")
    rng = np.random.default_rng(0)
    codes = np.maximum(0, rng.normal(size=(7, 30)))
    tasks = [made_task("a"), arc.Task(f"../{EVIL}", made_task("b").train, made_task("b").test)]
    made = [timeline(task, codes) for task in tasks]
    (where / "report.html").write_text("<!doctype html><title>latents</title>")
    told = {"latent_page": "../report.html#latent-{latent}", "names": {0: "reads red"}}
    return timelines.write(where / "timelines", made, title="Answers", facts={"model": "m"}, **told)


def saved(page: Any, kind: str) -> bytes:
    """The file that the button for this kind of picture gives."""
    with page.expect_download() as download:
        page.locator(f"[data-save={kind}]").click()
    return Path(download.value.path()).read_bytes()


def test_a_graph_is_saved_as_a_picture(tmp_path: Path, browse: Open):
    graph(3, 0.5).page(tmp_path / "graph.html")
    with browse(tmp_path / "graph.html") as page:
        assert b"fill: rgb(" in saved(page, "svg")
        assert saved(page, "png").startswith(b"\x89PNG")


def test_an_answer_is_stepped_through(answers: Path, browse: Open):
    with browse(answers) as page:
        page.get_by_role("link", name="a, test 0", exact=True).click()
        assert page.locator("#grid rect[fill^='#']").count() == 6  # 2 x 3, all written at the end
        page.get_by_label("step", exact=True).focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert page.locator("#grid rect[fill^='#']").count() == 2
        assert "step 1 of 6" in page.text_content("#said")
        assert "row 0, column 1" in page.text_content("#said")
        assert page.locator("#steps tr.now").get_attribute("data-step") == "1"
        page.get_by_role("button", name="next").click()
        assert page.locator("#grid rect[fill^='#']").count() == 3
        page.locator("body").press("ArrowLeft")
        assert page.locator("#grid rect[fill^='#']").count() == 2
        page.locator("#steps tbody tr").nth(4).click()
        lane = page.locator("#steps button").first
        lane.click()
        assert lane.get_attribute("aria-pressed") == "true"
        values = page.locator("#steps tbody tr td:nth-child(4)").all_text_contents()
        assert page.locator("#grid circle").count() == sum(bool(text) for text in values[:5])
        assert saved(page, "svg").startswith(b"<svg")
        assert saved(page, "png").startswith(b"\x89PNG")
        first = page.locator("#top a").first
        assert first.get_attribute("href") == f"../report.html#latent-{first.text_content()}"
        first.click()
        assert page.title() == "latents"


@pytest.mark.parametrize("how", [{"dark": True}, {"width": 360}, {"java_script_enabled": False}])
def test_an_answer_fits_every_window(answers: Path, browse: Open, how: dict):
    second = answers.parent / "answer-1.html"
    with browse(second, **how) as page:
        assert page.locator("#stage").is_visible() == ("java_script_enabled" not in how)
        assert page.locator("#steps tbody tr").count() == 7
        if "java_script_enabled" not in how:
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
