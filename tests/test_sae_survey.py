"""The survey of what latents fire on, against the plainest count; top tokens by the logit lens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae
from sae.evaluation import survey


@st.composite
def documents(draw):
    """A few documents of latents, most of them silent."""
    d_sae, rng = draw(st.integers(1, 6)), np.random.default_rng(draw(st.integers(0, 999)))
    lengths = draw(st.lists(st.integers(0, 5), max_size=6))
    codes = [np.maximum(rng.normal(-0.5, 2, (seq, d_sae)), 0).astype(np.float32) for seq in lengths]
    return d_sae, [np.round(code, 1) for code in codes]  # rounded: equal values occur


@given(documents(), st.integers(1, 4))
def test_a_survey_is_what_counting_gives(case, examples):
    d_sae, codes = case
    found = survey.Survey.take(codes, d_sae=d_sae, examples=examples)
    rows = np.concatenate([np.zeros((0, d_sae), np.float32), *codes])
    assert found.tokens == len(rows)
    np.testing.assert_array_equal(found.fired, (rows > 0).sum(0))
    np.testing.assert_allclose(found.density, (rows > 0).sum(0) / max(len(rows), 1))
    np.testing.assert_allclose(
        found.mean, [column[column > 0].mean() if (column > 0).any() else 0 for column in rows.T], rtol=1e-6
    )
    for latent in range(d_sae):
        peaks = [(-code[:, latent].max(initial=0), number) for number, code in enumerate(codes)]
        best = [number for peak, number in sorted(peaks) if peak < 0][:examples]
        assert found.documents(latent) == best
        expected, _ = np.histogram(rows[:, latent][rows[:, latent] > 0], survey.EDGES)
        np.testing.assert_array_equal(found.histogram[latent], expected)


@given(documents())
def test_pairs_and_dense_codes_survey_alike(case):
    d_sae, codes = case
    pairs = []
    for code in codes:
        order = np.argsort(-code, axis=1, kind="stable").astype(np.int32)
        pairs.append((jnp.asarray(order), jnp.asarray(np.take_along_axis(code, order, 1))))
    dense, sparse = survey.Survey.take(codes, d_sae=d_sae), survey.Survey.take(pairs, d_sae=d_sae)
    for field in dataclasses.fields(survey.Survey):
        np.testing.assert_array_equal(getattr(dense, field.name), getattr(sparse, field.name))


@given(documents(), st.integers(1, 8))
def test_chosen_latents_are_alive_distinct_and_spread_over_the_densities(case, count):
    d_sae, codes = case
    found = survey.Survey.take(codes, d_sae=d_sae)
    chosen = found.choose(count)
    live = int((found.fired > 0).sum())
    assert len(set(chosen)) == len(chosen) == min(count, live)
    densities = [found.fired[latent] for latent in chosen]
    assert densities == sorted(densities, reverse=True)
    if len(chosen) > 1:
        assert (densities[0], densities[-1]) == (found.fired.max(), found.fired[found.fired > 0].min())


def test_values_beyond_the_histogram_are_counted_in_its_outer_bins():
    found = survey.Survey.take([np.array([[1e-9, 1e9]], np.float32)], d_sae=2)
    assert (found.histogram[0, 0], found.histogram[1, -1]) == (1, 1)


def test_codes_that_are_no_latents_are_refused():
    with pytest.raises(sae.InputError, match="NaN or infinity"):
        survey.Survey.take([np.full((1, 2), np.nan, np.float32)], d_sae=2)
    with pytest.raises(sae.InputError, match="found latent 2, expected below d_sae=2"):
        survey.Survey.take([(np.array([[2]], np.int32), np.ones((1, 1), np.float32))], d_sae=2)


def test_promoted_tokens_are_those_the_direction_points_at():
    unembed = np.eye(5, 7, dtype=np.float32)
    directions = np.array([[0, 3, 1, 0, 2], [-1, 0, 0, 0, -2]], np.float32)
    ids, logits = survey.promoted_tokens(directions, jnp.asarray(unembed), count=3)
    np.testing.assert_array_equal(ids, [[1, 4, 2], [1, 2, 3]])
    np.testing.assert_array_equal(logits, [[3, 2, 1], [0, 0, 0]])
    assert survey.promoted_tokens(directions, unembed, count=99)[0].shape == (2, 7)
