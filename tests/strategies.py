"""All hypothesis strategies, one section per package."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import arc

# ---------------------------------------------------------------- qwen_eqx

# ---------------------------------------------------------------- arc


def grids(max_side: int = 30, colours: int = 10) -> st.SearchStrategy:
    """Any valid grid; hypothesis shrinks to 1 x 1 black, and draws 30 x 30 and all colours too."""
    sides = st.one_of(st.integers(1, max_side), st.sampled_from([1, max_side]))
    shapes = st.tuples(sides, sides)
    return shapes.flatmap(lambda s: arrays(np.uint8, s, elements=st.integers(0, colours - 1))).map(arc.as_grid)


def pairs(max_side: int = 6) -> st.SearchStrategy:
    return st.builds(arc.Pair, grids(max_side), grids(max_side))


def tasks(max_side: int = 6, max_pairs: int = 3) -> st.SearchStrategy:
    train = st.lists(pairs(max_side), min_size=1, max_size=max_pairs).map(tuple)
    test = st.lists(pairs(max_side), min_size=1, max_size=2).map(tuple)
    return st.builds(arc.Task, st.text("0123456789abcdef", min_size=8, max_size=8), train, test)


def augmentations(pairs: int = 0) -> st.SearchStrategy:
    """Any augmentation, for tasks of `pairs` training pairs."""
    colours = st.permutations(range(10)).map(tuple)
    order = st.permutations(range(pairs)).map(tuple)
    return st.builds(arc.Augmentation, st.sampled_from(list(arc.augment.SYMMETRIES)), colours, order)


# ---------------------------------------------------------------- sae
