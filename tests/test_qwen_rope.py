"""Rotary embeddings turn each pair by its own angle, kept in float32 for any dtype."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from qwen_eqx.model.rope import Rotation

D_HEAD = 8


def rotated(x: np.ndarray, positions: list[int], theta: float = 10_000.0, dtype: str = "float32") -> np.ndarray:
    """`x` [seq, heads, d_head], rotated at `positions`."""
    rotation = Rotation.at(jnp.asarray([positions], jnp.int32), x.shape[-1], theta)
    return np.asarray(rotation(jnp.asarray(x, dtype)[None])[0].astype(jnp.float32))


def heads(seed: int, seq: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(seq, 2, D_HEAD)).astype(np.float32)


@given(
    seed=st.integers(0, 99),
    positions=st.lists(st.integers(0, 40_959), min_size=3, max_size=3),
    theta=st.sampled_from([100.0, 10_000.0, 1_000_000.0]),
)
def test_rotation_is_the_complex_product(seed: int, positions: list[int], theta: float):
    """Angles are float32, so position p is off by at most about p · 2^-23 radians."""
    x = heads(seed)
    found = rotated(x, positions, theta)
    for row, position in enumerate(positions):
        for head in range(x.shape[1]):
            expected = oracles.rotate(x[row, head].astype(np.float64), position, theta)
            bound = (1e-6 + position * 2**-22) * np.abs(x[row, head]).max() * 2
            np.testing.assert_allclose(found[row, head], expected, rtol=0, atol=bound)


@given(seed=st.integers(0, 99), position=st.integers(0, 40_959))
@settings(max_examples=10)
def test_rotation_keeps_lengths(seed: int, position: int):
    x = heads(seed)
    np.testing.assert_allclose(
        np.linalg.norm(rotated(x, [position] * 3), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )


@given(seed=st.integers(0, 99), near=st.integers(0, 100), shift=st.integers(0, 400))
@settings(max_examples=10)
def test_scores_depend_on_the_distance_alone(seed: int, near: int, shift: int):
    q, k = heads(seed)[:1], heads(seed + 1)[:1]

    def score(at: int) -> np.ndarray:
        return (rotated(q, [at + near]) * rotated(k, [at])).sum(-1)

    np.testing.assert_allclose(score(0), score(shift), atol=1e-3 * np.abs(q).max() * np.abs(k).max())


def test_position_zero_is_left_alone():
    x = heads(0)
    np.testing.assert_array_equal(rotated(x, [0, 0, 0]), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_neighbours_far_out_differ_in_any_dtype(dtype: str):
    """bf16 holds 256 and 258 but no 257: angles taken in it would repeat a position."""
    x = np.zeros((3, 1, D_HEAD), np.float32)
    x[:, :, 0] = 1.0  # the fastest pair: one radian a position
    angles = rotated(x, [256, 257, 258], dtype=dtype)[:, 0]
    for row, position in enumerate((256, 257, 258)):
        assert angles[row, 0] == pytest.approx(np.cos(position), abs=2**-8)
        assert angles[row, D_HEAD // 2] == pytest.approx(np.sin(position), abs=2**-8)
