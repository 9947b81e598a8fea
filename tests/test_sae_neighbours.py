"""Neighbours of latents against the plainest count, and which documents are chosen to show one."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from sae.evaluation import neighbours, survey


@given(st.integers(0, 99), st.integers(2, 9), st.integers(1, 12))
def test_the_nearest_rows_are_those_of_largest_cosine(seed: int, latents: int, count: int):
    rows = np.random.default_rng(seed).normal(size=(latents, 4)).astype(np.float32)
    rows[0] = 0  # a row that points nowhere
    places, values = neighbours.nearest(rows, count)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    cosines = unit @ unit.T
    for latent in range(latents):
        others = [n for n in range(latents) if n != latent]
        expected = sorted(cosines[latent, others], reverse=True)[:count]
        np.testing.assert_allclose(values[latent], expected, atol=1e-6)
        np.testing.assert_allclose(cosines[latent, places[latent]], values[latent], atol=1e-6)
        assert latent not in places[latent]


@given(st.integers(0, 99), st.sampled_from([0.1, 0.6]))
def test_who_fires_together_is_what_counting_gives(seed: int, rate: float):
    rng = np.random.default_rng(seed)
    documents = [rng.random((length, 7)) * (rng.random((length, 7)) < rate) for length in (5, 1, 9)]
    found, positions = neighbours.together([scipy.sparse.csr_array(each) for each in documents], 3)
    fires = np.concatenate(documents) > 0
    assert positions == 15
    for latent, pairs in enumerate(found):
        both = (fires[:, [latent]] & fires).sum(0) / np.maximum((fires[:, [latent]] | fires).sum(0), 1)
        both[latent] = 0
        expected = [value for value in sorted(both, reverse=True)[:3] if value > 0]
        assert [share for _, share in pairs] == pytest.approx(expected)
        assert [both[other] for other, _ in pairs] == pytest.approx(expected)


def test_dense_latents_are_counted_on_every_nth_position(monkeypatch):
    monkeypatch.setattr(neighbours, "PRODUCTS", 50)
    found, positions = neighbours.together([scipy.sparse.csr_array(np.ones((20, 3)))], 5)
    assert positions == 5  # 180 pairs, at most 50
    assert found == [[(1, 1.0), (2, 1.0)], [(0, 1.0), (2, 1.0)], [(0, 1.0), (1, 1.0)]]


@given(st.lists(st.floats(0, 9), max_size=12).map(np.asarray), st.integers(1, 4))
def test_the_strongest_documents_come_first_and_the_others_from_the_range(peaks: np.ndarray, top: int):
    peaks = np.asarray(peaks, np.float64)
    chosen = survey.examples(peaks, top)
    firing = np.flatnonzero(peaks > 0)
    documents = [document for document, _ in chosen]
    assert len(set(documents)) == len(documents)
    assert set(documents) <= set(firing)
    assert list(peaks[documents[:top]]) == sorted(peaks[firing], reverse=True)[:top]
    assert [why for _, why in chosen[:top]] == [f"top {n}" for n in range(1, min(top, len(firing)) + 1)]
    for document, why in chosen[top:]:
        below = (peaks[firing] <= peaks[document]).mean()
        assert abs(below - float(why.removeprefix("quantile ")[:-1]) / 100) <= 1 / len(firing) + 0.25
