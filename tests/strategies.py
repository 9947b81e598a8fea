"""All hypothesis strategies, one section per package."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import arc
import qwen_eqx
import sae

# ---------------------------------------------------------------- qwen_eqx


@st.composite
def configs(draw, min_d_model: int = 1) -> qwen_eqx.QwenConfig:
    """Small decoders of both families: any group size, any head width, tied or not."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (1, 7)]))
    return qwen_eqx.QwenConfig(
        model_type=draw(st.sampled_from(["qwen2", "qwen3"])),
        vocab=draw(st.integers(2, 40)),
        d_model=draw(st.integers(min_d_model, 24)),
        layers=draw(st.integers(1, 3)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        d_head=2 * draw(st.integers(1, 6)),
        d_ff=draw(st.integers(1, 24)),
        max_seq=64,
        rope_theta=draw(st.sampled_from([100.0, 10_000.0, 1_000_000.0])),
        tied=draw(st.booleans()),
    )


def token_ids(vocab: int, min_size: int = 1, max_size: int = 16) -> st.SearchStrategy:
    return st.lists(st.integers(0, vocab - 1), min_size=min_size, max_size=max_size)


def prompts(vocab: int, rows: int, max_size: int = 16) -> st.SearchStrategy:
    """That many prompts of any lengths: with `max_size` 16 they all share the first bucket."""
    return st.lists(token_ids(vocab, 1, max_size), min_size=rows, max_size=rows)


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


@st.composite
def manifest_fields(draw):
    """What sae.Manifest takes, for small stores: any dtype, one to three sites, at least one item."""
    return {
        "model_id": "m",
        "revision": draw(st.none() | st.just("main")),
        "config_digest": "sha256:0",
        "tokenizer_digest": "sha256:1",
        "sites": tuple(f"blocks.{layer}.hook_resid_post" for layer in range(draw(st.integers(1, 3)))),
        "dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        "d_model": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 9)),
        "plan": sae.Plan(draw(st.integers(1, 9)), draw(st.integers(1, 10))),
        "config": {},
        "versions": {},
        "columns": draw(st.sampled_from([(), ("colour",), ("pair", "part", "row", "col", "colour")])),
    }


def json_objects():
    """What run metadata may hold."""
    values = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e6, 1e6) | st.text(max_size=5)
    names = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=5)
    return st.dictionaries(
        names,
        st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=5),
        max_size=4,
    )
