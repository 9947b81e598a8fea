"""Laws of the activation buffer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwen_eqx
import tiny
from qwen_eqx.generation.buffer import ActivationBuffer

DTYPES = ["bfloat16", "float16", "float32"]
SHAPE = {"sites": 2, "batch": 3, "new": 4, "d_model": 5}


@pytest.mark.parametrize(("dtype", "platform"), [*((dtype, None) for dtype in DTYPES), ("bfloat16", "tpu")])
@given(data=st.data())
def test_columns_hold_what_live_rows_wrote_last(dtype, platform, data):
    """The oracle is a NumPy array of the same dtype, written row by row."""
    buffer = ActivationBuffer.init(**SHAPE, dtype=dtype, platform=platform)
    expected = np.zeros(tuple(SHAPE.values()), jnp.dtype(dtype))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(0, 5))):
        column = data.draw(st.integers(0, SHAPE["new"] - 1))
        live = np.array(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
        values = (10.0 ** rng.integers(-6, 4) * rng.normal(size=(2, 3, 1, 5))).astype(np.float32)
        buffer = buffer.write(jnp.asarray(values), jnp.asarray(live), jnp.asarray(column, jnp.int32))
        expected[:, live, column] = values.astype(expected.dtype)[:, live, 0]
    for found in (buffer.values, eqx.filter_jit(lambda b: b.values)(buffer)):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(np.asarray(buffer.first(2).values), expected[:, :2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reading_makes_no_copy_and_survives_donation(dtype):
    if jax.default_backend() != "cpu":
        pytest.skip("the buffer holds floats there")
    buffer = ActivationBuffer.init(**SHAPE | {"d_model": 64}, dtype=dtype)
    values = buffer.values
    assert values.unsafe_buffer_pointer() == buffer.stored.unsafe_buffer_pointer()
    ones, live = jnp.ones((2, 3, 1, 64), jnp.float32), jnp.ones(3, bool)
    write = eqx.filter_jit(lambda old: old.write(ones, live, jnp.zeros((), jnp.int32)), donate="all")
    assert (write(buffer).values[:, :, 0] == 1).all()
    assert not values.any()  # still what was read


def test_it_suits_the_device_that_holds_the_model_and_not_the_default_one(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("the model lies on CPU")
    model = tiny.model(dtype="bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    generator, batch = qwen_eqx.prepare(model, [[1, 2]], max_new_tokens=2, capture=qwen_eqx.Capture(layers=[0]))
    state, _ = eqx.filter_eval_shape(generator.prefill, model, batch)
    assert state.buffer.stored.dtype == jnp.uint16
    elsewhere = ActivationBuffer.init(sites=1, batch=1, new=2, d_model=3, dtype="bfloat16", platform="tpu")
    assert elsewhere.stored.dtype == jnp.bfloat16
