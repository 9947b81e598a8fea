"""Only valid grids get in, and nothing changes them afterwards."""

import numpy as np
import pytest
from hypothesis import given

import arc
from strategies import grids, tasks


@given(grid=grids())
def test_lists_and_arrays_give_the_same_grid(grid):
    for value in (grid.tolist(), grid.astype(np.int64), np.asfortranarray(grid), tuple(map(tuple, grid.tolist()))):
        again = arc.as_grid(value)
        assert np.array_equal(again, grid)
        assert again.dtype == np.uint8
        assert again.flags.c_contiguous
        assert not again.flags.writeable


def test_freezing_a_grid_leaves_the_callers_array_alone():
    mine = np.zeros((2, 2), np.uint8)
    grid = arc.as_grid(mine)
    mine[0, 0] = 9
    assert grid[0, 0] == 0


BAD = {
    "no list": ("x", "grid: found str 'x', expected a list of rows"),
    "no rows": ([], "grid: found 0 x 0 cells, expected 1 to 30 rows and columns"),
    "empty row": ([[]], "grid: found 1 x 0 cells, expected 1 to 30 rows and columns"),
    "31 rows": ([[0]] * 31, "grid: found 31 x 1 cells, expected 1 to 30 rows and columns"),
    "31 columns": ([[0] * 31], "grid: found 1 x 31 cells, expected 1 to 30 rows and columns"),
    "ragged": ([[0, 1], [2]], "grid, row 1: found 1 cells, expected 2 as in row 0"),
    "row no list": ([[0], 1], "grid, row 1: found int 1, expected a list of integers"),
    "ten": ([[0, 10]], "grid, cell row 0 column 1: found 10, expected an integer 0 to 9"),
    "negative": ([[0], [-1]], "grid, cell row 1 column 0: found -1, expected an integer 0 to 9"),
    "float": ([[1.0]], "grid, cell row 0 column 0: found 1.0, expected an integer 0 to 9"),
    "bool": ([[True]], "grid, cell row 0 column 0: found True, expected an integer 0 to 9"),
    "none": ([[None]], "grid, cell row 0 column 0: found None, expected an integer 0 to 9"),
    "text": ([["1"]], "grid, cell row 0 column 0: found str '1', expected an integer 0 to 9"),
    "cube": (np.zeros((1, 1, 1), int), "grid: found a 3-D int64 array, expected a 2-D integer array"),
    "float array": (np.zeros((1, 1)), "grid: found a 2-D float64 array, expected a 2-D integer array"),
    "array of 300": (np.full((1, 1), 300), "grid, cell row 0 column 0: found 300, expected an integer 0 to 9"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_grids(case):
    value, line = BAD[case]
    with pytest.raises(arc.InputError) as error:
        arc.as_grid(value)
    assert str(error.value) == line


@given(task=tasks())
def test_tasks_are_values(task):
    again = arc.data.task_from_dict(task.id, task.to_dict(), "here")
    assert again == task
    assert hash(again) == hash(task)
    assert all(pair.output is None for pair in task.without_answers().test)
    assert task.without_answers() != task


@given(task=tasks())
def test_leave_one_out_moves_one_pair(task):
    if len(task.train) < 2:
        with pytest.raises(arc.InputError, match="found no pairs"):
            task.leave_one_out(0)
        return
    smaller = task.leave_one_out(1)
    assert smaller.test == (task.train[1],)
    assert (smaller.train[0], len(smaller.train)) == (task.train[0], len(task.train) - 1)


def test_a_training_pair_needs_its_output():
    with pytest.raises(arc.InputError, match="task t, train pair 0, output: missing"):
        arc.Task("t", (arc.Pair(arc.as_grid([[1]])),), (arc.Pair(arc.as_grid([[1]])),))
