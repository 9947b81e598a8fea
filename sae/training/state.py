"""What training is told, what it changes and what it reports."""

import dataclasses
from typing import Literal, NamedTuple

import equinox as eqx
import optax
from jaxtyping import Array, Float, Float32, Int32

from sae.errors import InputError
from sae.forms.abstract import AbstractSAE
from sae.forms.objectives import Hyper


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
    b2: float | None = None  # the form's choice if not said: 0.99 for JumpReLU, else 0.999
    eps: float = 1e-8
    clip_norm: float | None = None  # of the whole gradient
    product_dtype: Literal["float32", "bfloat16"] = "float32"  # operands of the dense products; sums are float32
    slots: int = 4  # BatchTopK, Matryoshka: candidates per sample, in units of k, before the dense path takes over
    threshold_decay: float = 0.99  # BatchTopK, Matryoshka: of the running threshold
    average_decay: float | None = None  # exponential average of the weights, which `finish` then returns
    centre: bool = True  # subtract the sample's mean
    rescale: bool = True  # to mean square norm 1
    bias_rate: float | None = None  # of biases and thresholds, over `learning_rate`; see `step.bias_rate`
    free_norm: bool | None = None  # decoder rows of any length, not of 1 (the form's choice if not said)
    bias_start: Literal["zero", "median"] = "zero"  # of b_dec: the mean (after centring) or the geometric median

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps: found {self.steps}, expected at least 1")
        if self.product_dtype not in ("float32", "bfloat16"):
            raise InputError(f"product_dtype: found {self.product_dtype!r}, expected 'float32' or 'bfloat16'")
        if self.warmup_steps + self.decay_steps > self.steps:
            found = f"{self.warmup_steps} + {self.decay_steps}"
            raise InputError(f"warmup_steps + decay_steps: found {found}, expected at most steps={self.steps}")

    def frees(self, module: AbstractSAE) -> bool:
        """Whether the decoder's rows may have any length while this module trains."""
        return module.unit_norm and (module.free_norm if self.free_norm is None else self.free_norm)


class TrainState(eqx.Module):
    """All that changes while training; with a leading axis on every leaf, the members of a sweep."""

    module: AbstractSAE  # on centred, rescaled activations; of free rows, `unit_rows` is what is meant
    average: AbstractSAE | None
    optimizer: optax.OptState
    hyper: Hyper
    step: Int32[Array, "*members"]
    since_fired: Int32[Array, "*members d_sae"]  # tokens
    scale: Float32[Array, "*members"]
    mean: Float32[Array, "*members d_model"]
    scale_out: Float32[Array, "*members"]
    mean_out: Float32[Array, "*members d_out"]
    bad_step: Int32[Array, "*members"]  # the first step whose loss was not finite, −1 if none; from it on nothing moves


class Metrics(NamedTuple):
    """Per step, on the batch it trained on."""

    loss: Float[Array, "*steps"]
    fvu: Float[Array, "*steps"]
    l0: Float[Array, "*steps"]
    dead: Int32[Array, "*steps"]
