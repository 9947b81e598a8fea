"""Each loss against its plain statement, each straight-through gradient against its derivation by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from sae.forms import gated, jumprelu, losses, matryoshka

RNG = np.random.default_rng(0)
X, X_HAT = RNG.normal(size=(2, 6, 4)).astype(np.float32)
TIGHT = {"rtol": 1e-5, "atol": 1e-6}


def test_errors_match_their_formulas():
    wide, guess = X.astype(np.float64), X_HAT.astype(np.float64)
    error = np.square(wide - guess).sum()
    np.testing.assert_allclose(losses.squared_error(jnp.array(X), jnp.array(X_HAT)), error / 6, **TIGHT)
    total = np.square(wide - wide.mean(0)).sum()
    np.testing.assert_allclose(losses.fvu(jnp.array(X), jnp.array(X_HAT)), error / total, **TIGHT)


def test_fvu_is_zero_where_nothing_varies():
    assert losses.fvu(jnp.ones((3, 2)), jnp.zeros((3, 2))) == 0


def test_l0_l1_and_target():
    z, decoder = np.maximum(X, 0), RNG.normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_allclose(losses.l0(jnp.array(z)), (z > 0).sum() / 6, **TIGHT)
    expected = (z * np.linalg.norm(decoder, axis=1)).sum() / 6
    np.testing.assert_allclose(losses.l1(jnp.array(z), jnp.array(decoder)), expected, **TIGHT)
    each = jumprelu.target_l0(jnp.array([1.0, 3.0]), jnp.float32(2))
    np.testing.assert_allclose(each, 0.25)  # of each sample: their mean is on target


def test_straight_through_gradients_by_hand():
    pre = jnp.array([[0.45, 0.55, 0.9, -1.0]])
    threshold, width = jnp.full(4, 0.5), jnp.float32(0.2)
    inside = np.array([1.0, 1.0, 0.0, 0.0])  # |π − θ| < ε/2
    step = jax.grad(lambda p, t: jumprelu.heaviside(p, t, width).sum(), (0, 1))(pre, threshold)
    np.testing.assert_allclose(step[0], 0)
    np.testing.assert_allclose(step[1], -inside / 0.2, rtol=1e-6)
    jump = jax.grad(lambda p, t: jumprelu.jump_relu(p, t, width).sum(), (0, 1))(pre, threshold)
    np.testing.assert_allclose(jump[0], [[0, 1, 1, 0]])
    np.testing.assert_allclose(jump[1], -inside * 0.5 / 0.2, rtol=1e-6)


def test_gate_auxiliary_freezes_the_decoder():
    gate, decoder, b_dec = jnp.array(X), jnp.array(RNG.normal(size=(4, 4)).astype(np.float32)), jnp.ones(4)
    found = gated.gate_auxiliary(jnp.array(X_HAT), gate, decoder, b_dec)
    expected = np.square(X_HAT - (np.maximum(X, 0) @ np.asarray(decoder) + 1)).sum() / 6
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    frozen = jax.grad(lambda d, b: gated.gate_auxiliary(jnp.array(X_HAT), gate, d, b), (0, 1))(decoder, b_dec)
    assert all(float(jnp.abs(g).max()) == 0 for g in frozen)
    assert float(jnp.abs(jax.grad(lambda g: gated.gate_auxiliary(jnp.array(X_HAT), g, decoder, b_dec))(gate)).max()) > 0


def test_prefixes_average_the_partial_errors():
    parts, b_dec = RNG.normal(size=(3, 6, 4)).astype(np.float32), np.ones(4, np.float32)
    loss, last = matryoshka.prefixes(jnp.array(X), [jnp.array(p) for p in parts], jnp.array(b_dec))
    sums = b_dec + np.cumsum(parts, axis=0)
    np.testing.assert_allclose(loss, np.mean([np.square(X - s).sum() / 6 for s in sums]), rtol=1e-5)
    np.testing.assert_allclose(last, sums[-1], rtol=1e-5)


def test_auxk_matches_by_hand_and_reaches_the_encoder():
    pre, decoder = RNG.normal(size=(6, 5)).astype(np.float32), RNG.normal(size=(5, 4)).astype(np.float32)
    dead = np.array([True, True, False, True, False])

    def loss(p, dead):
        return losses.auxk(jnp.array(X), p, jnp.array(dead), jnp.array(decoder), 2)

    masked = np.where(dead, pre, -np.inf)
    largest = masked >= np.sort(masked, axis=1)[:, -2:-1]
    z = np.where(largest, np.maximum(masked, 0), 0)
    np.testing.assert_allclose(loss(jnp.array(pre), dead), np.square(X - z @ decoder).sum() / 6, rtol=1e-5)
    gradient = jax.grad(loss)(jnp.array(pre), dead)
    assert float(jnp.abs(gradient).max()) > 0
    assert not np.asarray(gradient)[:, ~dead].any()
    nothing = jax.value_and_grad(loss)(jnp.array(pre), np.zeros(5, bool))
    assert float(nothing[0]) == 0
    assert not np.asarray(nothing[1]).any()
