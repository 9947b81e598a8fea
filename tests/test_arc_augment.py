"""The laws of the group, on grids, tasks and text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
from arc.augment import IDENTITY, SYMMETRIES, Augmentation, sample, sample_many
from strategies import augmentations, grids, tasks

NUMPY = {
    "identity": lambda g: g,
    "rotate90": np.rot90,
    "rotate180": lambda g: g[::-1, ::-1],
    "rotate270": lambda g: np.rot90(g, -1),
    "transpose": np.transpose,
    "antitranspose": lambda g: g[::-1, ::-1].T,
    "flip_horizontal": np.fliplr,
    "flip_vertical": np.flipud,
}


@pytest.mark.parametrize("name", SYMMETRIES)
@given(grid=grids())
def test_symmetries_are_what_their_names_say(name, grid):
    assert np.array_equal(Augmentation(name).apply_grid(grid), NUMPY[name](grid))


def test_the_eight_symmetries_differ():
    grid = arc.as_grid([[0, 1, 2], [3, 4, 5]])
    assert len({(g.shape, g.tobytes()) for g in (Augmentation(n).apply_grid(grid) for n in SYMMETRIES)}) == 8


@given(grid=grids(), augmentation=augmentations(3))
def test_invert_undoes_apply(grid, augmentation):
    assert np.array_equal(augmentation.invert(augmentation.apply_grid(grid)), grid)
    assert np.array_equal(augmentation.apply_grid(augmentation.invert(grid)), grid)


@given(data=st.data(), task=tasks())
def test_the_inverse_undoes_a_task(data, task):
    augmentation = data.draw(augmentations(len(task.train)))
    assert augmentation.inverse().apply(augmentation.apply(task)) == task
    assert augmentation.then(augmentation.inverse()) == IDENTITY == augmentation.inverse().then(augmentation)


@given(data=st.data(), task=tasks())
def test_composition_is_one_after_the_other(data, task):
    one, two, three = (data.draw(augmentations(len(task.train))) for _ in range(3))
    assert one.then(two).apply(task) == two.apply(one.apply(task))
    assert one.then(two).then(three) == one.then(two.then(three))
    assert one.then(two).inverse() == two.inverse().then(one.inverse())
    assert one.then(IDENTITY) == one == IDENTITY.then(one)


@given(data=st.data(), task=tasks())
def test_training_and_test_grids_are_mapped_alike(data, task):
    augmentation = data.draw(augmentations(len(task.train)))
    mapped = augmentation.apply(task)
    assert len(mapped.train) == len(task.train)
    for before, after in zip(task.test, mapped.test, strict=True):  # test inputs keep their order
        assert np.array_equal(after.input, augmentation.apply_grid(before.input))
        assert np.array_equal(augmentation.invert(after.output), before.output)
    expected = {
        (augmentation.apply_grid(p.input).tobytes(), augmentation.apply_grid(p.output).tobytes()) for p in task.train
    }
    assert {(p.input.tobytes(), p.output.tobytes()) for p in mapped.train} == expected


@given(augmentation=augmentations(4))
def test_the_text_form_reads_back(augmentation):
    assert Augmentation.parse(str(augmentation)) == augmentation


def test_the_text_form_is_readable():
    augmentation = Augmentation("rotate90", (0, 3, 1, 2, 4, 5, 6, 7, 8, 9), (2, 0, 1))
    assert str(augmentation) == "rotate90 colours=0312456789 order=2,0,1"
    assert str(IDENTITY) == "identity"
    assert Augmentation(order=(0, 1, 2)) == IDENTITY


@pytest.mark.parametrize("text", [
    "", "rotate45", "colours=01", "colours=0012345678", "colours=٠123456789", "order=1", "order=0,2", "order=a",
    "rotate90 rotate90", "identity noise=1", "order=", "order=99999999999999999999",
])  # fmt: skip
def test_bad_text_is_refused(text):
    with pytest.raises(arc.InputError) as error:
        Augmentation.parse(text)
    assert "\n" not in str(error.value)


def test_an_order_must_fit_the_task():
    one = arc.Pair(arc.as_grid([[1]]), arc.as_grid([[1]]))
    with pytest.raises(arc.InputError, match="order of 3 pairs, expected 2"):
        Augmentation(order=(2, 0, 1)).apply(arc.Task("t", (one, one), (one,)))
    with pytest.raises(arc.InputError, match="found 2 and 3 pairs"):
        Augmentation(order=(1, 0)).then(Augmentation(order=(2, 0, 1)))


@given(seed=st.integers(0, 2**32), pairs=st.integers(0, 4), keep=st.booleans())
def test_samples_repeat_with_the_seed_and_never_within_it(seed, pairs, keep):
    draw = lambda: sample_many(np.random.default_rng(seed), 24, pairs=pairs, keep_background=keep)  # noqa: E731
    drawn = draw()
    assert drawn == draw()
    assert len(set(drawn)) == 24
    assert drawn[0] == IDENTITY
    assert all(one.colours[0] == 0 for one in drawn) or not keep
    assert all(len(one.order) in (0, pairs) for one in drawn)


def test_samples_cover_the_whole_group():
    rng = np.random.default_rng(0)
    assert {one.symmetry for one in sample_many(rng, 8, colours=False)} == set(SYMMETRIES)
    assert len(sample_many(rng, 6, pairs=3, symmetries=False, colours=False)) == 6
    with pytest.raises(arc.InputError, match="count=9: expected 0 to 8"):
        sample_many(rng, 9, colours=False)
    assert sample_many(rng, 0) == ()
    moved = {sample(rng, keep_background=False).colours[0] for _ in range(200)}
    assert moved == set(range(10))
