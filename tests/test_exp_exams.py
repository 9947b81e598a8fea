"""evaluate_lm.py: what is marked right is right, by a model that knows the answers and by guesses that need none."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import arc
import evaluate_lm
import qwen_eqx
from qwen_lab import answering, exactness, exams
from qwen_lab.errors import InputError
from qwen_lab.lm_settings import HELD_OUT_FAMILIES
from running import run

FAMILIES = ("mirror", "count")


def tasks(each: int = 4) -> list[tuple[str, arc.Task]]:
    return [(exactness.family_of(task), task) for task in arc.generators.held_out((3, 4), FAMILIES, each)]


@pytest.fixture(scope="module")
def model():
    return qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)


def test_the_name_procedural_is_the_families_in_turn():
    """What a data set's name gives is what the generators make, the same every time, within the sides."""
    made = arc.load_tasks("procedural/3-4")
    first = [task.id.rpartition("-")[0] for task in made[:20]]
    assert len(set(first)) == 20
    assert [task.to_dict() for task in made] == [task.to_dict() for task in arc.generators.held_out((3, 4))]
    sides = [
        side for task in made for pair in (*task.train, *task.test) for side in (*pair.input.shape, *pair.output.shape)
    ]
    assert max(sides) == 4
    with pytest.raises(arc.InputError, match="expected sides 1 to 30"):
        arc.load_tasks("procedural/4-3")
    with pytest.raises(arc.InputError, match="no such path"):
        arc.load_tasks("procedural/3-4-5")


def test_a_right_answer_is_marked_under_every_augmentation(model, monkeypatch):
    """A model that knows the answers gets all; one that errs once in three loses the greedy one and wins the vote."""
    asked = tasks()
    asking = exams.asking_of(*model, "padded(4)", "compact", 64)
    known = {task.id: task for _, task in asked}

    def told(wrong):
        def complete(model, tokenizer, questions, encoder, how, first=0):
            for number, question in enumerate(questions):
                truth = question.view.apply_grid(known[question.task.id].test[question.test].output)
                grid = (truth + 1) % 10 if wrong(number) else truth
                yield [answering.Answer(np.asarray(tokenizer.encode(encoder.encode(grid.astype(np.uint8)))), 0.0)]

        return complete

    for wrong, greedy, voted in (
        (lambda n: False, 1.0, 1.0),
        (lambda n: n % 3 == 0, 0.0, 1.0),
        (lambda n: True, 0.0, 0.0),
    ):
        monkeypatch.setattr(answering, "complete", told(wrong))
        marks = list(exams.examine(*model, asked, asking, votes=3, max_new_tokens=64))
        assert exams.rates(marks, "greedy") == dict.fromkeys(FAMILIES, greedy)
        assert exams.rates(marks, "voted") == dict.fromkeys(FAMILIES, voted)


def test_guesses_that_need_no_model():
    def one(family: str, given: list, answer: list) -> tuple[str, arc.Task]:
        pair = arc.Pair(arc.as_grid(given), arc.as_grid(answer))
        return family, arc.Task("t", (pair,), (pair,))

    asked = [
        one("a", [[1]], [[1]]),
        one("a", [[1]], [[2]]),
        one("a", [[3]], [[2]]),
        one("a", [[2]], [[2]]),
        one("b", [[4]], [[4]]),
    ]
    assert exams.without_a_model(asked) == {
        "copy": {"a": 2 / 4, "b": 1.0},
        "constant": {"a": 3 / 4, "b": 0.0},  # the 2s guess one another, and nobody else's answer is 1
    }


def test_what_does_not_fit_counts_as_wrong(model):
    asking = dataclasses.replace(exams.asking_of(*model, "padded(4)", "compact", 8), budget=20)
    marks = list(exams.examine(*model, tasks(2), asking, votes=1, max_new_tokens=8))
    assert [(mark.greedy, mark.voted, mark.fits) for mark in marks] == [(False, False, False)] * 4


def test_the_command_writes_means_apart(tmp_path: Path):
    config = evaluate_lm.Config(
        sides=(3, 4), tasks_per_family=1, votes=2, max_new_tokens=4, random=False, data=("arc-agi-1/training",),
        data_limit=2, out=tmp_path,
    )  # fmt: skip
    said = run(evaluate_lm, config)
    assert "mean of the families never trained on" in said
    assert "mean of two rules in turn" in said
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert set(found["families"]) == {"greedy", "2 votes", "copy", "constant"}
    assert {"arc-agi-1/training", "gravity+mirror", "sort+frame"} <= set(found["families"]["greedy"])
    assert (tmp_path / "families.svg").read_text().startswith("<?xml")


def test_families_apart_are_those_that_no_stage_names():
    """Of a model that does not say, or of which a stage was written by an earlier version, those of the flag."""
    one, other = {"families": ["mirror", "frame"]}, {"families": ["frame", "stamp"]}
    asked = evaluate_lm.Config()
    assert evaluate_lm.never_trained_on(asked, []) == HELD_OUT_FAMILIES
    assert evaluate_lm.never_trained_on(asked, [one, {}]) == HELD_OUT_FAMILIES
    named = evaluate_lm.Config(held_out_families=("count",))
    assert evaluate_lm.never_trained_on(named, []) == ("count",)
    for config in (asked, named):
        apart = evaluate_lm.never_trained_on(config, [one, other])
        assert set(apart) == set(arc.generators.FAMILIES) - {"mirror", "frame", "stamp"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"held_out_families": ("nothing",)}, "--held-out-families: found 'nothing'"),
        ({"tasks_per_family": 0}, "found no task with a known answer"),
        ({"encoder": "nothing"}, "encoder 'nothing'"),
    ],
)
def test_wrong_flags_are_refused(tmp_path: Path, fields: dict, said: str):
    with pytest.raises((InputError, arc.InputError)) as raised:
        run(evaluate_lm, evaluate_lm.Config(out=tmp_path / "out", **{"tasks_per_family": 1, **fields}))
    assert said in str(raised.value)
    assert not (tmp_path / "out" / "metrics.json").exists()
