"""Metrics against float64 NumPy, and the splice that changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import sae
import tolerances
from sae.errors import InputError
from sae.evaluation import metrics

ONE_SITE = [name for name, form in sae.FORMS.items() if not form.several_sites]  # the others: test_sae_crosscoder

X = 2.0 * jax.random.normal(jax.random.key(1), (60, 6)) + 1.0
MEAN = X.mean(0)
GROUP = jnp.arange(60) % 4  # of five groups: the last has no rows
HEAD = jax.random.normal(jax.random.key(2), (6, 9))
LABELS = jnp.arange(60) % 9


def make(form, d_out=None):
    """A module some of whose latents never fire and one of which always does."""
    extra = {"k": 3} if "k" in sae.FORMS[form].details else {}
    module = sae.FORMS[form].init(d_model=6, d_sae=12, key=jax.random.key(0), d_out=d_out, **extra)
    bias = module.b_enc.at[0].set(-100.0).at[1].set(100.0)
    return module.__class__(**{**vars(module), "b_enc": bias})


def codes(module, x):
    return np.asarray(module.encode(x), np.float64), np.asarray(module.decoder, np.float64)


@pytest.mark.parametrize("form", ONE_SITE)
def test_every_total_against_float64(form):
    module = make(form)
    total = metrics.totals(module, X, MEAN, GROUP, 5)
    z, decoder = codes(module, X)
    want = oracles.sae_metrics(np.asarray(X), z, z @ decoder + np.asarray(module.b_dec), np.asarray(MEAN))
    found = metrics.summary(total)
    assert found.keys() == want.keys()
    assert found["dead_fraction"] > 0
    assert found["dense_fraction"] > 0
    for name in want:
        np.testing.assert_allclose(found[name], want[name], err_msg=name, **tolerances.METRIC)
    groups = metrics.by_group(total)
    for g in range(4):
        rows = np.asarray(GROUP) == g
        part = oracles.sae_metrics(
            np.asarray(X)[rows], z[rows], z[rows] @ decoder + np.asarray(module.b_dec), np.asarray(MEAN)
        )
        for name in groups:
            np.testing.assert_allclose(groups[name][g], part[name], err_msg=name, **tolerances.METRIC)
    assert groups["rows"][4] == 0
    assert all(np.isnan(values[4]) for name, values in groups.items() if name != "rows")


def test_batches_add_up_and_a_transcoder_is_measured_on_its_target():
    module = make("relu")
    whole, parts = metrics.evaluate(module, [X], MEAN), metrics.evaluate(module, list(X.reshape(4, 15, 6)), MEAN)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], err_msg=name, **tolerances.METRIC)
    module, y = make("jumprelu", d_out=5), X[:, :5] ** 2
    found = metrics.evaluate(module, [(X[:30], y[:30]), (X[30:], y[30:])], y.mean(0))
    z, decoder = codes(module, X)
    want = oracles.sae_metrics(np.asarray(y), z, z @ decoder + np.asarray(module.b_dec), np.asarray(y).mean(0))
    for name in want:
        np.testing.assert_allclose(found[name], want[name], err_msg=name, **tolerances.METRIC)
    with pytest.raises(InputError, match="batches"):
        metrics.evaluate(module, [], MEAN)


def test_density_counts_rows_and_its_histogram_leaves_out_the_silent():
    module = make("relu")
    total = metrics.totals(module, X, MEAN)
    fired = (np.asarray(module.encode(X)) > 0).mean(0)
    np.testing.assert_allclose(metrics.density(total), fired, rtol=1e-12)
    counts, edges = metrics.density_histogram(total, bins=7, floor=1e-3)
    want = [
        ((np.log10(fired, where=fired > 0, out=np.full(12, -9.0)) >= low) & (fired > 0)).sum() for low in edges[:-1]
    ]
    np.testing.assert_array_equal(np.cumsum(counts[::-1])[::-1], want)
    assert counts.sum() == (fired > 0).sum() < 12
    assert (edges[0], edges[-1]) == (-3.0, 0.0)


def test_the_perfect_reconstruction_the_mean_and_constant_rows():
    eye = jnp.eye(6)
    perfect = sae.ReLU(jnp.concatenate([eye, -eye]), jnp.zeros(12), jnp.concatenate([eye, -eye]), jnp.zeros(6))
    best = metrics.evaluate(perfect, [X], MEAN)
    assert (best["fvu"], best["explained_variance"], best["l0"]) == (0, 1, 6)
    assert (best["cosine"], best["norm_ratio"]) == pytest.approx((1, 1), abs=1e-6)
    guess = sae.ReLU(jnp.zeros((12, 6)), jnp.zeros(12), jnp.zeros((12, 6)), MEAN)
    assert metrics.evaluate(guess, [X], MEAN)["fvu"] == pytest.approx(1, abs=1e-6)
    zero = metrics.evaluate(guess, [jnp.zeros((4, 6))], jnp.zeros(6))  # no variance, no length: nothing divides by zero
    assert (zero["fvu"], zero["cosine"], zero["norm_ratio"], zero["l0"], zero["dead_fraction"]) == (0, 0, 0, 0, 1)


def logits(edit):
    """A model whose head reads the site through one more layer."""
    return jax.nn.tanh(edit(X)) @ HEAD


def test_what_the_model_recovers_against_float64():
    module = make("topk")
    found = metrics.recovered(logits, module, LABELS)

    def site(rows):
        return np.tanh(np.asarray(rows, np.float64)) @ np.asarray(HEAD, np.float64)

    want = oracles.recovered(site(X), site(module(X)), site(np.zeros((60, 6))), np.asarray(LABELS))
    assert found.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(found[name], want[name], err_msg=name, **tolerances.METRIC)
    eye = jnp.eye(6)
    perfect = sae.ReLU(jnp.concatenate([eye, -eye]), jnp.zeros(12), jnp.concatenate([eye, -eye]), jnp.zeros(6))
    best = metrics.recovered(logits, perfect, LABELS)
    assert (best["ce_recovered"], best["kl_recovered"], best["kl_sae"]) == (1, 1, 0)
    assert np.isnan(metrics.recovered(lambda edit: jnp.zeros((60, 9)), module, LABELS)["ce_recovered"])
