"""What training is told."""

import dataclasses
from numbers import Integral, Real
from typing import Literal, NamedTuple

from sae.errors import InputError
from sae.forms.abstract import AbstractDictionary

MOST = 2**31 - 1  # steps and tokens are counted in int32
GREATEST, LEAST = 3.4e38, 2.0**-126  # numbers are float32 on the device: others are infinite or 0 there


class Rule(NamedTuple):
    """The values that a number may have."""

    kind: type
    least: float
    most: float
    expected: str

    def check(self, name: str, value: object) -> None:
        right = isinstance(value, self.kind) and not isinstance(value, bool)
        if not right or not self.least <= value <= self.most:  # pyright: ignore[reportOperatorIssue]
            raise InputError(f"{name}: found {value!r:.80}, expected {self.expected}")


_FROM_0 = Rule(Integral, 0, MOST, f"a whole number from 0 to {MOST}")
_FROM_1 = Rule(Integral, 1, MOST, f"a whole number from 1 to {MOST}")
_NOT_NEGATIVE = Rule(Real, 0, GREATEST, "a finite number of at least 0")
_POSITIVE = Rule(Real, LEAST, GREATEST, "a finite number above 0")
_SHARE = Rule(Real, 0, 1 - 2.0**-24, "a number from 0 to below 1")  # the greatest float32 below 1
RULES = {
    "steps": _FROM_1, "warmup_steps": _FROM_0, "decay_steps": _FROM_0, "sparsity_warmup_steps": _FROM_0,
    "k_aux": _FROM_0, "dead_after": _FROM_1, "candidates": _FROM_1,
    "learning_rate": _NOT_NEGATIVE, "sparsity": _NOT_NEGATIVE, "target_l0": _NOT_NEGATIVE, "aux": _NOT_NEGATIVE,
    "bias_rate": _NOT_NEGATIVE, "bandwidth": _POSITIVE, "eps": _POSITIVE, "clip_norm": _POSITIVE,
    "b1": _SHARE, "b2": _SHARE, "threshold_decay": _SHARE, "average_decay": _SHARE,
}  # fmt: skip
OPTIONAL = {"k_aux", "b2", "clip_norm", "average_decay", "bias_rate"}
CHOICES = {"product_dtype": ("float32", "bfloat16"), "bias_start": ("zero", "median")}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What is fixed while a state trains; the numbers a sweep varies are `Hyper`, made from these by `init`."""

    steps: int  # all of them: the schedule's length
    learning_rate: float = 1e-3
    warmup_steps: int = 0  # the rate rises linearly from 0
    decay_steps: int = 0  # and falls linearly to 0 over the last of them
    sparsity: float = 0.0  # weight of L1 (ReLU, Gated) or L0 (JumpReLU); inputs have mean square norm 1
    sparsity_warmup_steps: int = 0
    target_l0: float = 0.0  # JumpReLU: penalize (L0/target − 1)² of each sample instead of L0
    bandwidth: float = 0.005  # JumpReLU: ε of the straight-through estimators
    aux: float = 1 / 32  # weight of AuxK (Gao et al. 2024, A.2)
    k_aux: int | None = None  # latents that model the error; half of d_model if not said, 0 turns AuxK off
    dead_after: int = 1_000_000  # tokens without firing
    b1: float = 0.9
    b2: float | None = None  # the form's choice if not said
    eps: float = 1e-8
    clip_norm: float | None = None  # of the whole gradient
    product_dtype: Literal["float32", "bfloat16"] = "float32"  # operands of the dense products; sums are float32
    candidates: int = (
        4  # where a batch keeps k on average: looked at per sample, over k, before the dense path takes over
    )
    threshold_decay: float = 0.99  # where a batch keeps k on average: of the running threshold
    average_decay: float | None = None  # exponential average of the weights, which `finish` then returns
    centre: bool = True  # subtract the sample's mean
    rescale: bool = True  # to mean square norm 1
    bias_rate: float | None = None  # of biases and thresholds, over `learning_rate`; the form's choice if not said
    free_norm: bool | None = None  # decoder rows of any length, not of 1 (the form's choice if not said)
    bias_start: Literal["zero", "median"] = "zero"  # of b_dec: the mean (after centring) or the geometric median

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            if (value := getattr(self, name)) is not None or name not in OPTIONAL:
                rule.check(name, value)
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"{name}: found {value!r:.80}, expected {' or '.join(map(repr, choices))}")
        if self.warmup_steps + self.decay_steps > self.steps:
            found = f"{self.warmup_steps} + {self.decay_steps}"
            raise InputError(f"warmup_steps + decay_steps: found {found}, expected at most steps={self.steps}")

    def frees(self, module: AbstractDictionary) -> bool:
        """Whether the decoder's rows may have any length while this module trains."""
        return module.unit_norm and (module.free_norm if self.free_norm is None else self.free_norm)
