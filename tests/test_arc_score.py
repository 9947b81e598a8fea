"""Scores against hand counts, and the whole way round on every bundled task."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
from arc.ask import Completion, Sample, ask, requests
from arc.parse import Parsed
from arc.score import evaluate, pass_at, per_task

G = arc.as_grid
X, Y, Z = G([[1]]), G([[2]]), G([[1, 1]])
ONE = arc.Task("one", (arc.Pair(X, Y),), (arc.Pair(X, X),))
TWO = arc.Task("two", (arc.Pair(X, Y),), (arc.Pair(X, X), arc.Pair(X, Z)))


def test_the_competitions_score():
    made = arc.submission.from_predictions({"one": [[Y, X]], "two": [[X], [X, Y]]})
    assert per_task(made, [ONE, TWO]) == {"one": 1.0, "two": 0.5}
    assert arc.score(made, [ONE, TWO]) == 0.75
    assert arc.score(arc.submission.to_json(made), [ONE, TWO]) == 0.75
    third = arc.submission.from_predictions({"one": [[Y, Z, X]]})  # only two attempts count
    assert arc.score(third, [ONE]) == 0.0


def test_scores_from_a_file(tmp_path):
    arc.submission.write(tmp_path / "s.json", {"one": [[X]]}, [ONE, TWO])
    assert arc.score(tmp_path / "s.json", [ONE, TWO]) == arc.score(str(tmp_path / "s.json"), [ONE, TWO]) == 0.5
    with pytest.raises(arc.InputError, match="task one: found nothing"):
        arc.score({}, [ONE])
    with pytest.raises(arc.InputError, match="tasks: found none"):
        arc.score({}, [])
    with pytest.raises(arc.InputError, match="task one, test pair 0: found no output"):
        arc.score(tmp_path / "s.json", [ONE.without_answers()])


@given(samples=st.integers(1, 9), data=st.data())
def test_pass_at_n_is_the_share_of_subsets_with_a_right_one(samples, data):
    right, n = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    wrong_subsets = comb(samples - right, n)
    assert pass_at(n, samples, right) == pytest.approx(1 - wrong_subsets / comb(samples, n))
    assert pass_at(1, samples, right) == pytest.approx(right / samples)


def test_pass_at_n_needs_n_samples():
    with pytest.raises(arc.InputError, match="pass@3: found 2 samples"):
        pass_at(3, 2, 1)


def sample(task, test, grid):
    parsed = Parsed(grid) if grid is not None else Parsed(reason="cut off")
    return Sample(task, test, arc.Augmentation(), Completion(""), parsed, grid)


def test_the_report_counts():
    samples = [sample("one", 0, X), sample("one", 0, Y), sample("one", 0, None), sample("two", 1, X)]
    made = arc.submission.from_predictions({"one": [[X, Y]]}, [ONE, TWO])
    report = evaluate(samples, made, [ONE, TWO], n=(1, 2))
    assert (report.score, report.per_output) == (0.5, 1 / 3)
    assert report.pass_at == {1: pytest.approx(1 / 9), 2: pytest.approx((1 - 1 / 3) / 3)}
    assert (report.parse_rate, report.right_size_rate) == (0.75, 0.5)
    first = report.rows[0]
    assert (first.solved, first.samples, first.parsed, first.right_size, first.right) == (1.0, 3, 2, 2, 1)
    assert first.reasons == {"cut off": 1}
    table = str(report).splitlines()
    assert table[0].startswith("score 50.0% of 2 tasks  per output 33.3%  pass@1 11.1%  pass@2 22.2%")
    assert table[3] == "one     100%        3       2     2      1  cut off 1"


def test_no_more_is_said_of_than_was_drawn():
    """By default n up to 8: of three samples pass@1 and pass@2 are, and nothing is called pass@8."""
    samples = [sample("one", 0, X), sample("one", 0, Y), sample("one", 0, None)]
    made = arc.submission.from_predictions({"one": [[X, Y]]}, [ONE])
    assert list(evaluate(samples, made, [ONE]).pass_at) == [1, 2]


def wrong_by_one(grid):
    cells = grid.copy()
    cells[-1, -1] = (cells[-1, -1] + 1) % 10
    return G(cells)


def solve(tasks, answer, views):
    """The whole way: augment, prompt, encode, complete, parse, invert, vote, submit."""
    rng = np.random.default_rng(0)
    predictions, samples = {}, []
    for task in tasks:
        asked = list(requests(task.without_answers(), arc.augment.sample_many(rng, views, pairs=len(task.train))))

        def complete(prompts, task=task, asked=asked):
            assert len(prompts) == len(asked)
            truths = [r.augmentation.apply_grid(answer(task.test[r.test].output)) for r in asked]
            texts = [arc.prompt.answer(truth) for truth in truths]
            return [text.removeprefix(r.prompt.begun) for text, r in zip(texts, asked, strict=True)]

        mine = ask(asked, complete)
        samples += mine
        predictions[task.id] = [
            [c.grid for c in arc.SELECT["count"](s for s in mine if s.test == test)] for test in range(len(task.test))
        ]
    return predictions, samples


@pytest.mark.parametrize("name", ["arc-agi-1/training", "arc-agi-1/evaluation", "arc-agi-2/evaluation"])
def test_the_oracle_scores_everything_and_one_wrong_cell_nothing(name, tmp_path):
    tasks = arc.load_tasks(name)
    predictions, samples = solve(tasks, lambda grid: grid, views=2)
    arc.submission.write(tmp_path / "submission.json", predictions, tasks)
    assert arc.score(tmp_path / "submission.json", tasks) == 1.0
    report = evaluate(samples, tmp_path / "submission.json", tasks)
    assert (report.score, report.per_output, report.parse_rate, report.right_size_rate) == (1.0, 1.0, 1.0, 1.0)
    assert set(report.pass_at.values()) == {1.0}

    predictions, samples = solve(tasks, wrong_by_one, views=1)
    arc.submission.write(tmp_path / "submission.json", predictions, tasks)
    assert arc.score(tmp_path / "submission.json", tasks) == 0.0
    report = evaluate(samples, tmp_path / "submission.json", tasks)
    assert (report.per_output, report.parse_rate, report.right_size_rate) == (0.0, 1.0, 1.0)


SIX = G([[1, 2, 3], [4, 5, 6]])
SMALL = arc.Task("small", (arc.Pair(SIX, G(SIX[::-1])), arc.Pair(Z, Z)), (arc.Pair(G(SIX.T), SIX),))


@pytest.mark.parametrize("encoder", arc.ENCODERS)
@pytest.mark.parametrize("form", arc.PROMPTS)
def test_the_oracle_in_every_encoding(encoder, form):
    task = SMALL
    for view in arc.augment.sample_many(np.random.default_rng(1), 4, pairs=len(task.train), keep_background=False):
        (request,) = requests(task, [view], arc.Asking(encoder, form))
        text = arc.prompt.answer(view.apply_grid(task.test[0].output), encoder, form)
        (found,) = ask([request], lambda prompts, text=text, r=request: [text.removeprefix(r.prompt.begun)])
        assert np.array_equal(found.grid, task.test[0].output)
