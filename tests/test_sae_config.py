"""What training is told: every number has bounds, said in one line."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from sae import training as train
from sae.errors import InputError
from sae.training.config import CHOICES, OPTIONAL, RULES

WHOLE = ["steps", "warmup_steps", "decay_steps", "sparsity_warmup_steps", "k_aux", "dead_after", "candidates"]
NUMBERS = ["learning_rate", "sparsity", "target_l0", "aux", "bias_rate", "bandwidth", "eps", "clip_norm"]
SHARES = ["b1", "b2", "threshold_decay", "average_decay"]
WRONG = [
    *((name, value) for name in WHOLE for value in (-1, 2**31, 10**400)),
    *((name, value) for name in NUMBERS + SHARES for value in (-1e-3, float("nan"), float("inf"), 1e39)),
    *((name, 0) for name in ("steps", "dead_after", "candidates")),
    *((name, 0.0) for name in ("bandwidth", "eps", "clip_norm")),
    *((name, 1e-300) for name in ("bandwidth", "eps", "clip_norm")),  # 0 in float32
    *((name, value) for name in SHARES for value in (1.0, 1 - 1e-12)),
]
RIGHT = {
    "warmup_steps": 0, "decay_steps": 5, "sparsity_warmup_steps": 7, "k_aux": 0, "candidates": 1, "learning_rate": 0.0,
    "bias_rate": 0.0, "bandwidth": 1.0, "eps": 1e-30, "clip_norm": 1e-3, "b1": 0.0, "b2": 0.0, "threshold_decay": 0.999999,
    "average_decay": 0.0, "target_l0": 1.5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_numbers_out_of_bounds_are_refused(name: str, value: float):
    with pytest.raises(InputError, match=f"^{name}: found {re.escape(str(value)[:80])}, expected a .*$"):
        train.TrainConfig(**{"steps": 5, name: value})


def test_every_number_has_bounds_and_what_is_within_them_is_taken():
    numbers = {field.name for field in dataclasses.fields(train.TrainConfig) if "bool" not in str(field.type)}
    assert numbers - RULES.keys() == set(CHOICES) == {"product_dtype", "bias_start"}
    assert set(WHOLE + NUMBERS + SHARES) == RULES.keys()
    assert {field.name for field in dataclasses.fields(train.TrainConfig) if field.default is None} >= OPTIONAL
    for name, value in RIGHT.items():
        assert getattr(train.TrainConfig(**{"steps": 5, name: value}), name) == value
    with pytest.raises(InputError, match=r"warmup_steps \+ decay_steps: found 4 \+ 4, expected at most steps=5"):
        train.TrainConfig(steps=5, warmup_steps=4, decay_steps=4)


@pytest.mark.parametrize("value", [5.0, "5", True, None])
def test_rules_refuse_what_is_no_number_of_their_kind(value: object):
    with pytest.raises(InputError, match=r"^steps: found .*, expected a whole number from 1 to 2147483647$"):
        RULES["steps"].check("steps", value)
    RULES["steps"].check("steps", np.int32(5))
    RULES["eps"].check("eps", 1)


def test_more_latents_than_there_are_is_no_target():
    module = sae.JumpReLU.init(d_model=6, d_sae=16, key=jax.random.key(0))
    x = jnp.ones((4, 6))
    train.init(module, train.TrainConfig(steps=5, target_l0=16.0), x)
    with pytest.raises(InputError, match=r"^target_l0: found 16.5, expected at most d_sae=16$"):
        train.init(module, train.TrainConfig(steps=5, target_l0=16.5), x)
