"""Properties of cells by hand on small grids, and how they turn with the grid."""

import numpy as np
from hypothesis import given

import arc
from arc import properties
from strategies import augmentations, grids

GRID = arc.as_grid([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 2]])


def cells(name: str, grid=GRID) -> set[tuple[int, int]]:
    return {(int(row), int(col)) for row, col in np.argwhere(properties.of_grid(grid)[name])}


def test_properties_by_hand():
    assert cells("colour red") == {(2, 3)}
    assert cells("coloured") == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)}
    assert cells("first row") == {(0, col) for col in range(4)}
    assert cells("last column") == {(row, 3) for row in range(3)}
    assert cells("corner") == {(0, 0), (0, 3), (2, 0), (2, 3)}
    assert cells("edge") == {(row, col) for row in range(3) for col in range(4)} - {(1, 1), (1, 2)}
    assert cells("enclosed") == {(1, 1)}
    assert cells("as the cell above") == {(1, 0), (1, 2), (1, 3), (2, 0), (2, 2)}
    assert cells("as the cell to the left") == {(0, 1), (0, 2), (2, 1), (2, 2)}
    assert cells("commonest colour but black") == cells("colour blue")
    assert cells("in the largest object") == set(), "there is only one"
    full = arc.as_grid([[3, 3, 3], [3, 3, 3], [3, 3, 3]])
    assert cells("inside an object", full) == {(1, 1)}
    two = arc.as_grid([[4, 0, 0], [0, 0, 5], [0, 0, 5]])
    assert cells("in the largest object", two) == {(1, 2), (2, 2)}
    assert cells("no coloured neighbour", two) == {(0, 0)}
    assert cells("commonest colour but black", arc.as_grid([[0, 0]])) == set()


def test_an_output_beside_its_input():
    given, answer = arc.as_grid([[1, 2], [3, 4]]), arc.as_grid([[1, 0], [3, 5]])
    beside = properties.of_output(given, answer)
    np.testing.assert_array_equal(beside["copied from the input"], [[True, False], [True, False]])
    np.testing.assert_array_equal(beside["changed from the input"], [[False, True], [False, True]])
    other = properties.of_output(arc.as_grid([[1]]), answer)
    assert not any(mask.any() for mask in other.values()), "grids of two sizes have no cells that stand at one place"


@given(grids(max_side=6))
def test_every_cell_has_one_colour_and_what_is_enclosed_is_black(grid):
    found = properties.of_grid(grid)
    np.testing.assert_array_equal(sum(mask.astype(int) for name, mask in found.items() if "colour " in name[:7]), 1)
    assert not (found["enclosed"] & (found["edge"] | found["coloured"])).any()
    assert not (found["inside an object"] & found["edge"]).any()
    assert properties.stacked(found, grid.shape).shape == (*grid.shape, len(properties.NAMES))


@given(grids(max_side=6), augmentations())
def test_what_has_no_direction_turns_with_the_grid(grid, augmentation):
    turned = properties.of_grid(augmentation.apply_grid(grid))
    only_turned = arc.Augmentation(augmentation.symmetry)
    if augmentation.colours[0] != 0:
        return  # black is what objects stand on
    for name in ("coloured", "edge", "corner", "inside an object", "no coloured neighbour", "enclosed"):
        mask = properties.of_grid(grid)[name].astype(np.uint8)
        np.testing.assert_array_equal(turned[name], only_turned.apply_grid(arc.as_grid(mask)))
