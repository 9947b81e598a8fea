"""What training changes and reports: a state from its first step, `init`, to a module for raw activations, `finish`."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int32

from sae import shown
from sae.errors import InputError
from sae.forms.abstract import AbstractDictionary
from sae.forms.ksparse import AbstractKSparse
from sae.forms.objective import Hyper, flat
from sae.training.config import TrainConfig


class TrainState(eqx.Module):
    """All that changes while training; with a leading axis on every leaf, the members of a sweep."""

    module: AbstractDictionary  # on centred, rescaled activations; of free rows, `unit_rows` is what is meant
    average: AbstractDictionary | None
    optimizer: optax.OptState
    hyper: Hyper
    step: Int32[Array, "*members"]
    since_fired: Int32[Array, "*members d_sae"]  # tokens
    scale: Float32[Array, "..."]  # of what is read: a number, or one for each site
    mean: Float32[Array, "..."]  # a row
    scale_out: Float32[Array, "..."]  # of what is written
    mean_out: Float32[Array, "..."]
    bad_step: Int32[Array, "*members"]  # the first step whose loss was not finite, −1 if none; from it on nothing moves

    def __repr__(self) -> str:
        step = shown.short(self.step)
        if isinstance(self.step, jax.Array) and not isinstance(self.step, Tracer):
            gone = self.step.is_deleted()  # `run` donates its state
            taken = [] if gone else sorted({*np.ravel(self.step).tolist()})
            step = "donated" if gone else " to ".join(str(number) for number in {taken[0]: 0, taken[-1]: 0})
        return f"TrainState({self.module}, step {step}{'' if self.average is None else ', averaged'})"


class StepMetrics(NamedTuple):
    """Per step, on the batch it trained on."""

    loss: Float[Array, "*steps"]
    fvu: Float[Array, "*steps"]
    l0: Float[Array, "*steps"]
    dead: Int32[Array, "*steps"]


def init(
    module: AbstractDictionary,
    config: TrainConfig,
    sample: Float[Array, "rows ..."],
    target: Float[Array, "rows ..."] | None = None,
) -> TrainState:
    """A state whose centring and scale come from `sample` (and `target`, what a transcoder writes)."""
    if sample.shape[1:] != module.reads:
        raise InputError(f"sample: found rows of shape {sample.shape[1:]}, expected {module.reads}")
    if target is None and module.writes != module.reads:
        raise InputError(f"target: found none, expected rows of d_out={module.writes[-1]} for a transcoder")
    if config.target_l0 > module.d_sae:
        raise InputError(f"target_l0: found {config.target_l0}, expected at most d_sae={module.d_sae}")
    module = module.balanced() if config.frees(module) else module
    mean, scale = _standards(sample, config)
    mean_out, scale_out = (mean, scale) if target is None else _standards(target, config)
    if config.bias_start == "median":
        written = standardized(sample if target is None else target, mean_out, scale_out)
        median = geometric_median(flat(written)).reshape(module.writes)
        module = eqx.tree_at(lambda m: m.b_dec, module, median)
    state = TrainState(
        module=module,
        average=None if config.average_decay is None else module,
        optimizer=adam(config, module).init(eqx.filter(module, eqx.is_array)),
        hyper=hyper(module, config),
        step=jnp.int32(0),
        since_fired=jnp.zeros(module.d_sae, jnp.int32),
        scale=scale,
        mean=mean,
        scale_out=scale_out,
        mean_out=mean_out,
        bad_step=jnp.int32(-1),
    )
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)  # `run` donates: no two leaves may share memory


def hyper(module: AbstractDictionary, config: TrainConfig, k: float | None = None) -> Hyper:
    """The numbers that a sweep may vary, from a config; `k` lowers a form's own."""
    own = module.k if isinstance(module, AbstractKSparse) else 0
    k = own if k is None else k
    numbers = config.learning_rate, config.sparsity, config.target_l0, k, config.aux, config.bandwidth
    return Hyper(*(jnp.float32(number) for number in numbers))


def adam(config: TrainConfig, module: AbstractDictionary) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=module.b2 if config.b2 is None else config.b2, eps=config.eps)


def standardized(
    rows: Float[Array, "rows ..."], mean: Float[Array, "..."], scale: Float[Array, "..."]
) -> Float[Array, "rows ..."]:
    """scale · (row − mean) in float32, with one scale for each site."""
    return (rows.astype(jnp.float32) - mean[None]) * jnp.expand_dims(scale, (0, rows.ndim - 1))


def finish(state: TrainState) -> AbstractDictionary:
    """The trained module for raw activations: the average if one is kept, rows of length 1, centring and scale in it."""
    module = state.module if state.average is None else state.average
    module = module.unit_rows() if module.unit_norm else module
    if isinstance(module, AbstractKSparse) and int(state.hyper.k) < module.k:
        module = dataclasses.replace(module, k=int(state.hyper.k))
    return module.fold(state.scale, state.mean, state.scale_out, state.mean_out)


def geometric_median(rows: Float[Array, "rows width"], iterations: int = 64) -> Float[Array, " width"]:
    """argmin_m Σ‖row − m‖ by Weiszfeld's iteration from the mean."""

    def closer(_, median):
        weights = 1.0 / jnp.maximum(jnp.linalg.norm(rows - median[None], axis=-1), 1e-8)
        return jnp.einsum("r,rw->w", weights / jnp.sum(weights), rows)

    return lax.fori_loop(0, iterations, closer, jnp.mean(rows, axis=0))


def _standards(rows: Float[Array, "rows ..."], config: TrainConfig) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(mean row, scale): after both the mean square norm is 1, at each site."""
    rows = rows.astype(jnp.float32)
    mean = jnp.mean(rows, axis=0) if config.centre else jnp.zeros(rows.shape[1:], jnp.float32)
    square = jnp.mean(jnp.sum(jnp.square(rows - mean[None]), axis=-1), axis=0)
    scale = jnp.where(square > 0, lax.rsqrt(jnp.where(square > 0, square, 1.0)), 1.0)
    return mean, scale if config.rescale else jnp.ones_like(scale)
