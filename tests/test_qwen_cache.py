"""The ring: which entries a row may read, and that where it stands on the ring changes nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import tolerances
from qwen_eqx import Qwen
from qwen_eqx.model.cache import KVCache, cache_bytes, visible

KV_SEQ = 12


def written(history: list[int | None], kv_seq: int) -> list[int | None]:
    """What each entry holds after writing one token after another, None for a pad or another sequence's token."""
    entries: list[int | None] = [None] * kv_seq
    for index, position in enumerate(history):
        entries[index % kv_seq] = position
    return entries


@given(pads=st.integers(0, 30), real=st.integers(1, 8), seq=st.integers(1, 4), kv_seq=st.just(KV_SEQ))
def test_a_query_sees_its_own_row_s_tokens_up_to_itself(pads: int, real: int, seq: int, kv_seq: int):
    """`pads` tokens of no concern, then `real` of the row, then a chunk of `seq` more: entry by entry."""
    history = [None] * pads + list(range(real))
    chunk = list(range(real, real + seq))
    mask = visible(jnp.asarray([chunk]), jnp.asarray(len(history)), kv_seq)
    entries = written(history + chunk, kv_seq)
    for row, query in enumerate(chunk):
        expected = [held is not None and held <= query for held in entries]
        assert np.asarray(mask[0, row]).tolist() == expected


def test_a_pad_sees_nothing():
    mask = visible(jnp.asarray([[-2, -1, 0, 1]]), jnp.asarray(0), 4)
    assert np.asarray(mask[0]).astype(int).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@eqx.filter_jit
def read(model: Qwen, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    x, cache = model.forward(tokens, cache.length, cache)
    return model.logits(x[:, -1]), cache


def start(index: int, fill: float = 0.0, rows: int = 2) -> KVCache:
    """A cache in the middle of its life: the next token goes to entry `index`, and every entry holds `fill`."""
    cache = KVCache.init(tiny.CONFIGS["qwen2"], batch=rows, kv_seq=KV_SEQ, dtype=jnp.float32)
    layers = jax.tree.map(lambda leaf: jnp.full_like(leaf, fill), cache.layers)
    return KVCache(layers, jnp.asarray(index, jnp.int32), cache.length)


def one_by_one(cache: KVCache, tokens: np.ndarray) -> np.ndarray:
    logits = []
    for column in range(tokens.shape[1]):
        step, cache = read(tiny.model(), jnp.asarray(tokens[:, column : column + 1]), cache)
        logits.append(np.asarray(step))
    return np.stack(logits, axis=1)


@given(index=st.integers(0, 40) | st.just(10**6), fill=st.sampled_from([0.0, 7.0]), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_a_ring_that_wraps_gives_what_a_straight_cache_gives(index: int, fill: float, seed: int):
    """Whatever older sequences left in the entries."""
    tokens = np.random.default_rng(seed).integers(0, 97, (2, KV_SEQ))
    expected = np.stack([np.asarray(tiny.model()(jnp.asarray(row))) for row in tokens])
    np.testing.assert_allclose(one_by_one(start(0), tokens), expected, **tolerances.SAME_F32)
    np.testing.assert_allclose(one_by_one(start(index, fill), tokens), expected, **tolerances.SAME_F32)


def test_a_row_begins_anew_while_another_goes_on():
    """Row 0's entries still hold its first sequence when it begins the second."""
    rng = np.random.default_rng(0)
    first, second, other = rng.integers(0, 97, 5), rng.integers(0, 97, 6), rng.integers(0, 97, 11)
    cache = start(9)
    for column in range(11):
        if column == 5:
            cache = eqx.tree_at(lambda c: c.length, cache, cache.length.at[0].set(0))
        tokens = jnp.asarray([[np.concatenate([first, second])[column]], [other[column]]])
        logits, cache = read(tiny.model(), tokens, cache)
    assert np.asarray(cache.length).tolist() == [6, 11]
    for row, sequence in enumerate((second, other)):
        alone = tiny.model()(jnp.asarray(sequence))[-1]
        np.testing.assert_allclose(logits[row], alone, **tolerances.SAME_F32)


def test_left_pads_are_never_seen():
    tokens = np.random.default_rng(0).integers(0, 97, (2, 8))
    cache = eqx.tree_at(lambda c: c.length, start(0), jnp.asarray([-3, 0], jnp.int32))
    logits, after = read(tiny.model(), jnp.asarray(tokens), cache)
    assert np.asarray(after.length).tolist() == [5, 8]
    assert int(after.index) == 8
    for row, sequence in enumerate((tokens[0, 3:], tokens[1])):
        np.testing.assert_allclose(logits[row], tiny.model()(jnp.asarray(sequence))[-1], **tolerances.SAME_F32)
    other = tokens.copy()
    other[0, :3] = (other[0, :3] + 1) % 97
    again, _ = read(tiny.model(), jnp.asarray(other), cache)
    np.testing.assert_array_equal(again, logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_as_large_as_the_formula_says(dtype: str):
    cache = KVCache.init(tiny.CONFIGS["qwen2"], batch=3, kv_seq=7, dtype=dtype)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    assert size == cache_bytes(tiny.CONFIGS["qwen2"], batch=3, kv_seq=7, dtype=dtype)
    assert len({id(leaf) for leaf in jax.tree.leaves(cache.layers)}) == 2 * 2  # k and v of each layer on their own


def test_a_cache_grows_into_a_larger_one():
    small = start(5, 3.0)
    large = small.grown(KVCache.init(tiny.CONFIGS["qwen2"], batch=2, kv_seq=20, dtype=jnp.bfloat16))
    for old, new in zip(jax.tree.leaves(small.layers), jax.tree.leaves(large.layers), strict=True):
        assert (new.shape[2], new.dtype) == (20, jnp.bfloat16)
        np.testing.assert_array_equal(new[:, :, :KV_SEQ].astype(jnp.float32), old)
        assert not np.asarray(new[:, :, KV_SEQ:]).any()
