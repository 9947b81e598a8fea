"""The products of training are those of the model, gradients too, and a value that is not a number stays one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import tolerances
from qwen_eqx import training
from qwen_eqx.model.layers import matmul
from qwen_eqx.training import products


@eqx.filter_jit
def pulled(function, x, weight, dy):
    value, back = jax.vjp(function, x, weight)
    return value, *back(dy)


@settings(max_examples=8)
@given(st.integers(1, 40), st.sampled_from([(3, 8), (8, 3), (5, 5), (1, 2)]), st.sampled_from(["float32", "bfloat16"]))
def test_a_product_and_its_gradients_are_the_models(rows: int, widths: tuple[int, int], dtype: str):
    keys = jax.random.split(jax.random.key(rows), 3)
    x = jax.random.normal(keys[0], (rows, widths[0]), dtype)
    weight = jax.random.normal(keys[1], widths[::-1], dtype)
    dy = jax.random.normal(keys[2], (rows, widths[1])).astype(dtype).astype(jnp.float32)
    value, *ours = pulled(products.product, x, weight, dy)
    np.testing.assert_array_equal(value, eqx.filter_jit(matmul)(x, weight))
    exact = np.asarray(x, np.float64), np.asarray(weight, np.float64), np.asarray(dy, np.float64)
    for found, expected in zip(ours, (exact[2] @ exact[1], exact[2].T @ exact[0]), strict=True):
        assert found.dtype == jnp.dtype(dtype)
        most = np.abs(expected).max() + 1e-6
        allowed = 1e-5 if dtype == "float32" else tolerances.BF16_ROW
        assert np.abs(np.asarray(found, np.float64) - expected).max() <= allowed * most


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])  # with biases; with a tied head
def test_a_model_with_these_products_has_its_own_loss_and_gradient(name: str):
    model = tiny.model(name)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab, (3, 9)), jnp.int32)
    given = training.Batch(tokens, jnp.ones(tokens.shape), jnp.zeros(tokens.shape, bool))
    of = eqx.filter_jit(eqx.filter_value_and_grad(lambda model, wrap: training.totals(wrap(model), given).loss.sum()))
    plain, expected = of(model, lambda model: model)
    ours, found = of(model, products.trained)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerances.SAME_F32)


@pytest.mark.parametrize("widths", [(3, 8), (8, 3)])
@pytest.mark.parametrize("at", [(0, 0), (2, 1)])
def test_nan_reaches_the_weights_gradient(widths: tuple[int, int], at: tuple[int, int]):
    x, weight = jnp.ones((4, widths[0])).at[at].set(jnp.nan), jnp.ones(widths[::-1])
    *_, dw = pulled(products.product, x, weight, jnp.ones((4, widths[1])))
    assert np.isnan(dw[:, at[1]]).all()
