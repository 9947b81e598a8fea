"""F1 of latents and properties against the plainest count, and what chooses does not measure."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import sae
from sae.evaluation import matching


@given(st.data(), st.integers(1, 30), st.integers(1, 4), st.integers(1, 3))
def test_f1_is_counted(data, rows: int, latents: int, names: int):
    values = st.sampled_from([0.0, 0.1, 0.4, 1.0])
    codes = data.draw(arrays(np.float32, (rows, latents), elements=values.map(np.float32)))
    labels = data.draw(arrays(bool, (rows, names)))
    parts = [
        matching.Rows(codes[: rows // 2], labels[: rows // 2]),
        matching.Rows(codes[rows // 2 :], labels[rows // 2 :]),
    ]
    found = matching.match(parts, parts)
    for latent in range(latents):
        for name in range(names):
            best = 0.0
            for cut in matching.CUTS:
                fires = codes[:, latent] > np.float32(cut) * codes[:, latent].max()
                right = (fires & labels[:, name]).sum()
                both = fires.sum() + labels[:, name].sum()
                best = max(best, 2 * right / both if both else 0.0)
            assert abs(found.f1[latent, name] - best) < 1e-6
    np.testing.assert_allclose(found.density, (codes > 0).mean(axis=0))


def test_a_planted_latent_is_found_and_its_cut_is_chosen_elsewhere():
    rng = np.random.default_rng(0)
    labels = rng.random((400, 3)) < 0.3
    codes = rng.random((400, 8)).astype(np.float32) * (rng.random((400, 8)) < 0.2)
    codes[:, 5] = np.where(labels[:, 1], 1 + rng.random(400), 0.3 * rng.random(400))
    half = matching.Rows(codes[:200], labels[:200]), matching.Rows(codes[200:], labels[200:])
    found = matching.match([half[0]], [half[1]])
    assert found.f1[5, 1] == 1.0
    assert 0.1 < found.cut[5, 1] < 1.0
    assert matching.strongest(found.f1, 1).tolist() == [[5, 1]]
    shuffled = matching.Rows(codes[200:], labels[200:][rng.permutation(200)])
    assert matching.match([half[0]], [shuffled]).f1[5, 1] < 0.5


def test_no_latent_and_no_property_is_named_twice():
    f1 = np.asarray([[0.9, 0.8], [0.85, 0.2], [0.1, 0.1]])
    assert matching.strongest(f1, 5).tolist() == [[0, 0], [1, 1]]


def test_rows_that_are_none_are_refused():
    rows = matching.Rows(np.zeros((2, 3), np.float32), np.zeros((2, 1), bool))
    assert matching.match([rows], [rows]).f1.tolist() == [[0.0]] * 3
    with pytest.raises(sae.InputError, match="choosing: found no rows"):
        matching.match([], [rows])
    with pytest.raises(sae.InputError, match="rows: found none"):
        matching.match([rows], [])
