"""Linear probes: what can be read is read, what cannot is not, and the penalty is what leaving each row out prefers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import InputError
from sae.evaluation import probing


def rows(count: int, width: int, classes: int, signal: float, seed: int) -> probing.Rows:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    labels[:classes] = np.arange(classes)
    centres = np.random.default_rng(99).standard_normal((classes, width))
    return probing.Rows((signal * centres[labels] + rng.standard_normal((count, width))).astype(np.float32), labels)


def test_classes_that_lie_apart_are_read_and_noise_is_not():
    far = probing.accuracy(rows(80, 30, 4, 5.0, 0), rows(400, 30, 4, 5.0, 1))
    assert far.probe > 0.98
    assert far.shuffled < 0.4
    near = probing.accuracy(rows(80, 30, 4, 0.0, 0), rows(2000, 30, 4, 0.0, 1))
    assert 0.2 < near.probe < 0.3
    assert 0.2 < near.commonest < 0.3


@given(st.integers(0, 2**32), st.floats(0.1, 10), st.integers(2, 4))
def test_shift_and_scale_of_a_dimension_change_nothing(seed: int, scale: float, classes: int):
    training, measuring = rows(40, 6, classes, 1.0, seed), rows(60, 6, classes, 1.0, seed + 1)
    moved = [probing.Rows((scale * each.x + 3).astype(np.float32), each.labels) for each in (training, measuring)]
    plain, other = probing.accuracy(training, measuring), probing.accuracy(*moved)
    assert abs(plain.probe - other.probe) < 0.05  # a row on the border may change sides by rounding


def test_the_penalty_is_the_one_that_leaving_one_out_prefers(monkeypatch):
    """Against fits that really leave each row out."""
    training, measuring = rows(24, 40, 3, 0.6, 3), rows(50, 40, 3, 0.6, 4)
    x = (training.x - training.x.mean(0)) / training.x.std(0)
    y = np.eye(3)[training.labels]

    def without(penalty: float) -> float:
        right = 0
        for out in range(len(x)):
            kept = np.delete(np.arange(len(x)), out)
            # as the formula does: an unpenalized mean beside penalized weights
            design = np.hstack([x[kept].astype(np.float64), np.ones((len(kept), 1))])
            weights = np.linalg.solve(
                design.T @ design + penalty * np.diag([1.0] * x.shape[1] + [0.0]), design.T @ y[kept]
            )
            right += int((np.append(x[out], 1.0) @ weights).argmax() == training.labels[out])
        return right / len(x)

    scores = {penalty: without(penalty) for penalty in probing.PENALTIES}
    best = max(penalty for penalty, score in scores.items() if score == max(scores.values()))
    chosen = probing.accuracy(training, measuring)
    monkeypatch.setattr(probing, "PENALTIES", np.asarray([best]))
    assert probing.accuracy(training, measuring).probe == chosen.probe


def test_a_dimension_that_never_changes_is_no_obstacle():
    training, measuring = rows(30, 5, 2, 4.0, 0), rows(30, 5, 2, 4.0, 1)
    training.x[:, 2] = measuring.x[:, 2] = 7
    assert probing.accuracy(training, measuring).probe > 0.9


@pytest.mark.parametrize(("count", "measured", "low"), [(1, 5, 0), (5, 0, 0), (5, 5, -1)])
def test_too_little_is_refused(count: int, measured: int, low: int):
    x = np.zeros((count, 3), np.float32)
    with pytest.raises(InputError, match="probe: found"):
        probing.accuracy(
            probing.Rows(x, np.full(count, low)),
            probing.Rows(np.zeros((measured, 3), np.float32), np.zeros(measured, int)),
        )
