"""What training is told."""

import dataclasses
import math
from typing import Literal

from sae.errors import InputError
from sae.forms.abstract import AbstractDictionary


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
        if self.steps < 1:
            raise InputError(f"steps: found {self.steps}, expected at least 1")
        if self.steps >= 2**31:
            raise InputError(f"steps: found {self.steps}, expected below 2147483648")
        if not 1 <= self.dead_after < 2**31:
            raise InputError(f"dead_after: found {self.dead_after}, expected 1 to 2147483647")
        for name in ("learning_rate", "sparsity", "target_l0", "aux", "warmup_steps", "decay_steps", "bandwidth"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name}: found {value}, expected a finite number of at least 0")
        if self.bandwidth == 0:
            raise InputError(f"bandwidth: found {self.bandwidth}, expected a number above 0")
        if self.product_dtype not in ("float32", "bfloat16"):
            raise InputError(f"product_dtype: found {self.product_dtype!r}, expected 'float32' or 'bfloat16'")
        if self.warmup_steps + self.decay_steps > self.steps:
            found = f"{self.warmup_steps} + {self.decay_steps}"
            raise InputError(f"warmup_steps + decay_steps: found {found}, expected at most steps={self.steps}")

    def frees(self, module: AbstractDictionary) -> bool:
        """Whether the decoder's rows may have any length while this module trains."""
        return module.unit_norm and (module.free_norm if self.free_norm is None else self.free_norm)
