"""The shuffle buffer loses, repeats and invents nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.data import buffer
from sae.errors import InputError


@given(st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_every_row_comes_out_once(batch, seed):
    store = buffer.ShuffleBuffer.init(capacity=40, d_model=1, key=jax.random.key(seed))
    store = store.add(jnp.arange(40.0)[:, None])
    seen = []
    while int(store.size) >= batch:
        store, rows = store.draw(steps=1, batch=batch)
        seen += np.asarray(rows).ravel().tolist()
    seen += np.asarray(store.rows[: int(store.size)]).ravel().tolist()
    assert sorted(seen) == list(range(40))


def test_full_and_empty():
    store = buffer.ShuffleBuffer.init(capacity=4, d_model=2, key=jax.random.key(0))
    store = store.add(jnp.ones((6, 2)), jnp.array([True, True, False, True, True, True]))
    assert (int(store.size), int(store.dropped)) == (4, 1)
    with pytest.raises(InputError, match="draw"):
        store.draw(steps=1, batch=5)


def test_sinks_are_filtered():
    rows = jnp.ones((9, 4)).at[3].set(100.0).at[5].set(jnp.nan)
    assert np.flatnonzero(~np.asarray(buffer.not_a_sink(rows))).tolist() == [3, 5]


def test_mixing():
    ordered = jnp.repeat(jnp.arange(4), 8).reshape(4, 8).astype(jnp.int32)
    assert float(buffer.mixing(ordered)) == 0
    assert float(buffer.mixing(ordered.T.reshape(4, 8))) > 0.9
    store = buffer.ShuffleBuffer.init(capacity=512, d_model=1, key=jax.random.key(0))
    for number in range(4):
        store = store.add(jnp.full((128, 1), float(number)))
    _, rows, source = store.draw_with_source(steps=8, batch=64)
    np.testing.assert_array_equal(rows[..., 0], source)
    assert float(buffer.mixing(source)) > 0.95


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rows_of_several_sites_come_out_as_they_went_in(dtype):
    """The same rows in the same order as a float32 buffer gives, in half the bytes."""
    rows = jax.random.normal(jax.random.key(1), (48, 2, 3)).astype(dtype)
    half, whole = (
        buffer.ShuffleBuffer.init(capacity=40, d_model=3, sites=2, key=jax.random.key(0), dtype=kind)
        for kind in (dtype, jnp.float32)
    )
    for part in (rows[:30], rows[30:]):
        half, whole = half.add(part), whole.add(part.astype(jnp.float32))
        (half, ours), (whole, theirs) = half.draw(steps=3, batch=4), whole.draw(steps=3, batch=4)
        assert ours.dtype == half.rows.dtype == dtype
        assert ours.shape == (3, 4, 2, 3)
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs)
    assert 2 * half.bits.nbytes == whole.bits.nbytes
