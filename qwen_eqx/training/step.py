"""One training step: the gradient of a few batches, clipped, through AdamW or Muon, with float32 master weights."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, PyTree

from qwen_eqx.errors import InputError, positive
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.training import lora, sharding
from qwen_eqx.training.loss import Batch, Totals, cast, totals


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What is fixed while a state trains."""

    steps: int  # all of them: the schedule's length
    learning_rate: float = 1e-3
    warmup_steps: int = 0  # the rate rises linearly from 0
    final_rate: float = 0.1  # share of the learning rate at the end of the cosine
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: the blocks' matrices; AdamW moves the rest
    weight_decay: float = 0.0  # of matrices alone
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0  # of the whole gradient
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and sums are float32
    remat: bool = False  # keep what goes into a block, compute its inside again

    def __post_init__(self) -> None:
        positive("steps", self.steps)
        for name, most in (("learning_rate", math.inf), ("weight_decay", math.inf), ("final_rate", 1)):
            if not 0 <= (value := getattr(self, name)) <= most or math.isinf(value):
                raise InputError(f"{name}: found {value}, expected a finite number from 0 to {most}")
        for name in ("b1", "b2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise InputError(f"{name}: found {value}, expected 0 to below 1")
        if not 0 < self.eps < math.inf or not (self.clip_norm is None or 0 < self.clip_norm < math.inf):
            raise InputError(f"eps, clip_norm: found {self.eps}, {self.clip_norm}, expected numbers above 0")
        if not 0 <= self.warmup_steps <= self.steps:
            raise InputError(f"warmup_steps: found {self.warmup_steps}, expected 0 to steps={self.steps}")
        for name, known in (("optimizer", ("adamw", "muon")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(known)}")

    def rate(self, step: Int32[Array, "..."] | int) -> Float32[Array, "..."]:
        """The learning rate of a step, counted from 0: linear up, then half a cosine down to `final_rate` of it."""
        step = jnp.asarray(step, jnp.float32)
        up = (step + 1) / max(1, self.warmup_steps)
        share = jnp.clip((step - self.warmup_steps) / max(1, self.steps - self.warmup_steps), 0, 1)
        down = self.final_rate + (1 - self.final_rate) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        return self.learning_rate * jnp.where(step < self.warmup_steps, up, down)


class TrainState(eqx.Module):
    """All that changes while training."""

    model: Qwen  # float32 master weights; those that a LoRA stands beside are frozen and keep their dtype
    optimizer: PyTree
    step: Int32[Array, ""]
    bad_step: Int32[Array, ""]  # the first whose loss or gradient was not finite, −1 if none; from it on nothing moves

    def __repr__(self) -> str:
        where = "shapes" if isinstance(self.step, jax.ShapeDtypeStruct | Tracer) else f"step {int(self.step)}"
        return f"TrainState({where}, {self.model!r})"


class StepMetrics(NamedTuple):
    """Per step."""

    totals: Totals
    gradient_norm: Float32[Array, "*steps"]  # before it is clipped
    learning_rate: Float32[Array, "*steps"]


def init(model: Qwen, config: TrainConfig) -> TrainState:
    """The state before the first step; the model's own arrays stay untouched."""
    spec = lora.trainable(model)
    moved, kept = eqx.partition(model, spec)
    moved = cast(moved, jnp.float32)
    state = TrainState(eqx.combine(moved, kept), _optimizer(config, moved).init(moved), jnp.int32(0), jnp.int32(-1))
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True) if eqx.is_array(leaf) else leaf, state)


def step(
    state: TrainState, batch: Batch, config: TrainConfig, mesh: Mesh | None = None
) -> tuple[TrainState, StepMetrics]:
    """One step on `batch`, [accumulate, batch, seq]: the gradient is that of all its documents in one batch."""
    moved, kept = eqx.partition(state.model, lora.trainable(state.model))

    def loss(moved: Any, part: Batch) -> tuple[Float32[Array, ""], Totals]:
        dtype = jnp.dtype(config.dtype)
        model = sharding.gathered(cast(eqx.combine(moved, kept), dtype), mesh)
        each = totals(model, part, dtype=dtype, remat=config.remat, mesh=mesh)
        sums = jax.tree.map(jnp.sum, each)
        return sums.loss, sums

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        (_, sums), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(moved, part)
        return jax.tree.map(jnp.add, carry, (gradient, sums)), None

    if batch.tokens.shape[0] == 1:
        only = jax.tree.map(lambda leaf: leaf[0], batch)
        (_, sums), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(moved, only)
    else:
        nothing = jax.tree.map(jnp.zeros_like, moved), Totals(*(jnp.float32(0) for _ in range(4)))
        (gradient, sums), _ = jax.lax.scan(add, nothing, batch)
    gradient = jax.tree.map(lambda leaf: leaf / jnp.where(sums.weight > 0, sums.weight, 1), gradient)
    norm = optax.tree.norm(gradient)
    rate = config.rate(state.step)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
        updates, optimizer = _optimizer(config, moved).update(gradient, state.optimizer, moved)
    fresh = jax.tree.map(lambda leaf, update: leaf - rate * update, moved, updates)
    fine = (state.bad_step < 0) & jnp.isfinite(norm) & jnp.isfinite(sums.loss)
    new = TrainState(
        eqx.combine(fresh, kept),
        optimizer,
        state.step + 1,
        jnp.where((state.bad_step < 0) & ~fine, state.step, state.bad_step),
    )
    still = dataclasses.replace(state, bad_step=new.bad_step)
    return _where(fine, new, still), StepMetrics(sums, norm, rate)


def _where(fine: Array, new: TrainState, old: TrainState) -> TrainState:
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b) if eqx.is_array(a) else a, new, old)


def _optimizer(config: TrainConfig, moved: Any) -> optax.GradientTransformation:
    """What is subtracted, over the learning rate; decay is of matrices alone (arXiv 1711.05101)."""
    # as functions: a tree of the model's shape is callable, as the model is, and optax would call it
    matrices = lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 2, tree)  # noqa: E731
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    if config.optimizer == "muon":
        # arXiv 2502.16982: an orthogonal step scaled to the size of AdamW's, so that one rate serves both
        muon = optax.contrib.muon(-1.0, consistent_rms=0.2)  # optax turns signs with the rate
        parts.append(optax.partition({"muon": muon, "adam": adam}, _labels))
    else:
        parts.append(adam)
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, matrices))
    return optax.chain(*parts)


def _labels(moved: Any) -> Any:
    def of_leaf(path: tuple[Any, ...], leaf: Array) -> str:
        return "muon" if leaf.ndim == 2 and "blocks" in jax.tree_util.keystr(path) else "adam"

    return jax.tree_util.tree_map_with_path(of_leaf, moved)
