"""Every form: sparse equals dense, its rule holds, folding changes nothing but units; sparse products against dense."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae
from sae.codes import products, select
from sae.errors import InputError

ONE_SITE = [name for name, form in sae.FORMS.items() if not form.several_sites]  # the others: test_sae_crosscoder

KEY = jax.random.key(0)
K_FORMS = [name for name in ONE_SITE if "k" in sae.FORMS[name].details]


def make(form, d_model=8, d_sae=16, d_out=None, k=3):
    extra = {"k": k} if form in K_FORMS else {}
    return sae.FORMS[form].init(d_model=d_model, d_sae=d_sae, key=KEY, d_out=d_out, **extra)


@pytest.mark.parametrize("d_out", [None, 5])
@pytest.mark.parametrize("form", ONE_SITE)
def test_sparse_and_dense_agree_and_fold_keeps_the_function(form, d_out):
    module = make(form, d_out=d_out)
    x = jax.random.normal(jax.random.key(1), (2, 4, 8))
    z = module.encode(x)
    assert z.shape == (2, 4, 16)
    assert float(z.min()) >= 0
    np.testing.assert_allclose(module.decode(module.encode_sparse(x, 16)), module.decode(z), atol=1e-5)
    np.testing.assert_allclose(module(x), module.decode(z), atol=1e-6)
    mean, scale = jnp.linspace(-1, 1, 8), jnp.float32(2)
    mean_out, scale_out = (mean, scale) if d_out is None else (jnp.ones(5), jnp.float32(3))
    folded = module.fold(scale, mean, scale_out, mean_out)
    inner = scale * (x - mean[None, None])
    np.testing.assert_allclose(folded(x), module(inner) / scale_out + mean_out[None, None], atol=1e-5)
    np.testing.assert_allclose(folded.encode(x), module.encode(inner) / scale, atol=1e-5)


@pytest.mark.parametrize("form", ["relu", "jumprelu", "gated"])
def test_length_moves_between_a_latent_and_its_row(form):
    module, x = make(form), jax.random.normal(jax.random.key(1), (5, 8))
    lengths = jnp.exp(jax.random.normal(jax.random.key(2), (16,)))
    module = dataclasses.replace(module, b_enc=jax.random.normal(jax.random.key(3), (16,)) / 4)
    longer = module.lengthened(lengths)
    np.testing.assert_allclose(longer.encode(x), module.encode(x) * lengths[None], rtol=1e-4, atol=1e-5)
    for same in (longer, longer.unit_rows(), longer.balanced()):
        np.testing.assert_allclose(same(x), module(x), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(longer.unit_rows().decoder, axis=-1), 1, rtol=1e-5)
    balanced = longer.balanced()
    read, write = (jnp.linalg.norm(matrix, axis=-1) for matrix in (balanced.encoder, balanced.decoder))
    np.testing.assert_allclose(read, write, rtol=1e-5)
    empty = dataclasses.replace(module, decoder=module.decoder.at[0].set(0.0))
    assert np.isfinite(np.asarray(empty.balanced().unit_rows().encoder)).all()


def test_k_rules():
    x = jax.random.normal(jax.random.key(1), (10, 8))
    assert ((make("topk").encode(x) > 0).sum(-1) <= 3).all()
    assert int((make("batchtopk").encode(x) > 0).sum()) == 30
    tied = jnp.zeros((1, 16)).at[0, jnp.array([2, 5, 7, 9])].set(1.0)
    assert np.flatnonzero(np.asarray(make("topk").activate(tied))[0]).tolist() == [2, 5, 7]
    assert np.flatnonzero(np.asarray(make("batchtopk").activate(tied))[0]).tolist() == [2, 5, 7]


@pytest.mark.parametrize("k", [0, 17])
def test_impossible_k_is_refused(k):
    with pytest.raises(InputError, match="k: found"):
        make("topk", k=k)
    with pytest.raises(InputError, match="max_active"):
        make("relu").encode_sparse(jnp.ones((1, 8)))


@pytest.mark.parametrize("l0", [0.5, 3.0, 6.5])
def test_thresholds_set_by_rows_let_as_many_fire_as_asked(l0):
    spread = 0.05 * jnp.exp(jax.random.normal(KEY, (16,)) / 4)
    module = dataclasses.replace(make("jumprelu"), threshold=spread)
    x = 6 * jax.random.normal(jax.random.key(1), (9000, 8))  # more than are looked at at once
    asked = module.at_l0(x, l0)
    assert float((asked.encode(x) > 0).sum(-1).mean()) == pytest.approx(l0, rel=1e-3)
    ratio = np.asarray(asked.threshold / module.threshold)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    for rows, wanted in ((x[:0], 2.0), (x, 0.0), (x, 16.5)):
        with pytest.raises(InputError, match="at_l0: found"):
            module.at_l0(rows, wanted)
    assert float((module.at_l0(x, 16.0).encode(x) > 0).sum(-1).mean()) > 6.5  # all of them: as many as can fire
    relu = make("relu")
    assert relu.at_l0(x, l0) is relu  # others stay as they are


def test_impossible_starts_are_refused():
    with pytest.raises(InputError, match="encoder_norm: found 0"):
        sae.TopK.init(d_model=4, d_sae=8, k=2, key=KEY, encoder_norm=0.0)
    with pytest.raises(InputError, match="threshold: found -1"):
        sae.JumpReLU.init(d_model=4, d_sae=8, key=KEY, threshold=-1.0)


def test_smaller_than_the_model_works():
    assert make("topk", d_model=9, d_sae=4)(jnp.ones((2, 9))).shape == (2, 9)


@pytest.mark.parametrize(("batch", "width", "size", "k"), [(7, 5, 32, 3), (130, 9, 512, 2), (600, 7, 64, 40)])
def test_sparse_products_and_gradients(batch, width, size, k):
    x, table = jax.random.normal(KEY, (batch, width)), jax.random.normal(jax.random.key(1), (size, width))
    bias = jnp.zeros(size)
    code = products.choose(x, table, bias, k)
    np.testing.assert_allclose(code.values, jax.lax.top_k(x @ table.T, k)[0], rtol=1e-4, atol=1e-5)
    weights = jax.random.normal(jax.random.key(2), (batch, k))

    def ours(weights, table, x):
        return (
            products.weighted_rows(code.indices, weights * products.row_dots(code.indices, x, table), table) ** 2
        ).sum()

    def pairs(weights, table, x):
        rows, columns = jnp.repeat(jnp.arange(batch), k), code.indices.reshape(-1)
        dots = products.pair_dots(rows, columns, x, table)
        return (products.pair_rows(rows, columns, weights.reshape(-1) * dots, table, batch) ** 2).sum()

    def plain(weights, table, x):
        chosen = table[code.indices]
        return (jnp.einsum("bk,bkd->bd", weights * jnp.einsum("bd,bkd->bk", x, chosen), chosen) ** 2).sum()

    expected = jax.jit(jax.grad(plain, (0, 1, 2)))(weights, table, x)
    for function in (ours, pairs):
        for found, wanted in zip(jax.jit(jax.grad(function, (0, 1, 2)))(weights, table, x), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_keep_largest_keeps_exactly_that_many():
    values = jnp.array([[0.0, 2.0, 2.0], [2.0, 1.0, 0.0]])
    assert np.asarray(select.keep_largest(values, jnp.int32(2))).tolist() == [[False, True, True], [False] * 3]
    assert int(select.keep_largest(values, jnp.int32(4)).sum()) == 4


@given(st.integers(0, 10**6), st.sampled_from([(3, 5), (40, 7), (64, 64)]), st.sampled_from([1, 3, 10**6]), st.data())
def test_the_last_value_kept_is_found_by_counting_bits(seed, shape, values, data):
    """Both ways agree with a sort, with many equal values and with zeros among them."""
    rng = np.random.default_rng(seed)
    drawn = np.maximum(rng.normal(size=shape), 0) if values > 3 else rng.integers(0, values + 1, shape)
    positive = jnp.asarray(drawn.astype(np.float32))
    count = data.draw(st.integers(0, positive.size))
    kept = np.asarray(select.keep_largest(positive, jnp.int32(count)))
    order = np.argsort(-np.asarray(positive).reshape(-1), kind="stable")[:count]
    expected = np.zeros(positive.size, bool)
    expected[order] = True
    np.testing.assert_array_equal(kept.reshape(-1), expected)
    bits = jax.lax.bitcast_convert_type(positive, jnp.int32)
    assert int(select._bit_by_bit(bits, jnp.int32(count))) == int(select._by_histograms(bits, jnp.int32(count)))
