"""Ranking does not depend on the order of samples, and rescoring asks for what it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
from arc.ask import Completion, Request, Sample, ask, read, requests
from arc.parse import Parsed
from arc.vote import by_class, by_count, by_log_prob, rescore
from strategies import augmentations, grids

A, B, C = (arc.as_grid([[colour]]) for colour in (1, 2, 3))


def sample(grid, log_prob=0.0, symmetry="identity"):
    parsed = Parsed(grid) if grid is not None else Parsed(reason="no grid")
    return Sample("t", 0, arc.Augmentation(symmetry), Completion("", log_prob), parsed, grid)


def order(candidates):
    return [int(candidate.grid[0, 0]) for candidate in candidates]


def test_count_then_mean_log_prob():
    samples = [sample(A, -9.0), sample(A, -9.0), sample(B, -1.0), sample(C, -2.0), sample(None)]
    ranked = by_count(samples)
    assert order(ranked) == [1, 2, 3]
    assert [(c.votes, c.mean_log_prob) for c in ranked] == [(2, -9.0), (1, -1.0), (1, -2.0)]
    assert ranked[0].samples == (samples[0], samples[1])
    assert order(by_log_prob(samples)) == [2, 3, 1]
    assert by_count([]) == by_count([sample(None)]) == []


def test_two_levels_count_classes_before_samples():
    many = [sample(A, 0.0, "rotate90")] * 5
    wide = [sample(B, 0.0, name) for name in ("identity", "rotate90", "transpose")]
    assert order(by_count(many + wide)) == [1, 2]
    ranked = by_class(many + wide)
    assert order(ranked) == [2, 1]
    assert [c.votes for c in ranked] == [3, 1]


def test_a_class_sends_only_its_best():
    inside = [sample(A), sample(A), sample(B), sample(B), sample(C)]
    ranked = by_class(inside, keep=2)
    assert order(ranked) == [1, 2, 3]
    assert ranked[-1].votes == 0


sampled = st.builds(
    sample, st.one_of(st.none(), grids(2, 3)), st.floats(-50, 0), st.sampled_from(list(arc.augment.SYMMETRIES))
)


@pytest.mark.parametrize("name", arc.SELECT)
@given(samples=st.lists(sampled, max_size=12), data=st.data())
def test_every_vote_holds_all_evidence_once_whatever_the_order(name, samples, data):
    ranked = arc.SELECT[name](samples)
    assert sorted(id(s) for c in ranked for s in c.samples) == sorted(id(s) for s in samples if s.grid is not None)
    assert all(np.array_equal(s.grid, c.grid) for c in ranked for s in c.samples)
    assert len({(c.grid.shape, c.grid.tobytes()) for c in ranked}) == len(ranked)
    again = arc.SELECT[name](data.draw(st.permutations(samples)))
    assert [c.grid.tolist() for c in again] == [c.grid.tolist() for c in ranked]


TASK = arc.Task("t", (arc.Pair(A, B), arc.Pair(B, C)), (arc.Pair(A, B),))


def test_rescoring_sums_the_log_probs_of_each_views_answer():
    calls = []
    views = [arc.Augmentation(), arc.Augmentation(colours=(0, 2, 1, *range(3, 10)))]

    def score(prompt, completions):
        calls.append((prompt, completions))
        return [-float(len(calls)) * int(text.strip()[0 if " " not in text else -5]) for text in completions]

    candidates = by_count([sample(A), sample(C)])
    ranked = rescore(candidates, TASK, 0, score, views)
    assert len(calls) == 2
    for (prompt, completions), view in zip(calls, views, strict=True):
        assert prompt == arc.prompt.build(view.apply(TASK)).text
        said = [arc.prompt.answer(view.apply_grid(c.grid)) for c in candidates]
        assert [prompt[prompt.rindex("### Output") :] + text for text in completions] == said
    # grid 1 is written 1, then 2: -(1*1 + 2*2); grid 3 both times 3: -(1*3 + 2*3)
    assert {int(c.grid[0, 0]): c.score for c in ranked} == {1: -5.0, 3: -9.0}
    assert order(ranked) == [1, 3]


def test_rescoring_refuses_what_is_no_score():
    with pytest.raises(arc.InputError, match="expected 1 log-probabilities"):
        rescore(by_count([sample(A)]), TASK, 0, lambda prompt, texts: [float("nan")])
    with pytest.raises(arc.InputError, match="expected 1 log-probabilities"):
        rescore(by_count([sample(A)]), TASK, 0, lambda prompt, texts: [])
    assert rescore([], TASK, 0, lambda prompt, texts: []) == []


@given(grid=grids(6), augmentation=augmentations(2))
def test_an_answer_is_turned_back(grid, augmentation):
    task = arc.Task("t", TASK.train, (arc.Pair(A), arc.Pair(B)))
    asked = list(requests(task, [augmentation]))
    assert [request.test for request in asked] == [0, 1]
    said = arc.prompt.answer(augmentation.apply_grid(grid)).removeprefix(asked[0].prompt.begun)
    found = read(asked[0], Completion(said, -1.5))
    assert np.array_equal(found.grid, grid)
    assert (found.completion.log_prob, found.augmentation) == (-1.5, augmentation)
    assert read(asked[1], "no").grid is None


def test_asking_takes_texts_completions_or_several_each():
    asked: list[Request] = list(requests(TASK))
    right = " shape: 1x1\n1 2\n```"
    for reply in (right, Completion(right, -1.0), [Completion(right), Completion("?")]):
        samples = ask(asked, lambda prompts, reply=reply: [reply for _ in prompts])
        assert samples[0].grid.tolist() == [[2]]
        assert len(samples) == (2 if isinstance(reply, list) else 1)
    with pytest.raises(arc.InputError, match="complete: found 0 completions, expected 1"):
        ask(asked, lambda prompts: [])


def test_a_budget_reaches_the_prompt():
    full = next(iter(requests(TASK))).prompt.text
    tight = next(iter(requests(TASK, asking=arc.Asking(count=len, budget=len(full) - 1)))).prompt
    assert len(tight.dropped) == 1
