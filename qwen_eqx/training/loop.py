"""Training: many steps per compiled call, over any iterator of batches.

state = training.init(model, config)
for state, metrics in training.fit(state, batches, config):
    ...                                                    # log, save a checkpoint, stop
model = training.merge(state.model)
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from qwen_eqx.errors import InputError
from qwen_eqx.sharding import mesh_of
from qwen_eqx.training import sharding
from qwen_eqx.training.loss import Batch
from qwen_eqx.training.step import StepMetrics, TrainConfig, TrainState, step


class NotFinite(ArithmeticError):
    """A loss or gradient was not finite: `step` is the first such step, `state` the last good state."""

    def __init__(self, state: TrainState):
        self.state, self.step = state, int(state.bad_step)
        super().__init__(f"step {self.step}: the loss or its gradient is not finite; the state before it is kept")


class Given(NamedTuple):
    """What one compiled call is told beside the state."""

    config: TrainConfig
    batches: Batch
    mesh: Mesh | None


def run(state: TrainState, batches: Batch, config: TrainConfig) -> tuple[TrainState, StepMetrics]:
    """One compiled call over [steps, accumulate, batch, seq], no more than are left; `state` is donated.

    A state on a mesh trains there (`training.place`).
    """
    if batches.tokens.ndim != 4:
        raise InputError(f"batches: found {batches.tokens.ndim} axes, expected steps, accumulate, batch, seq")
    if (left := config.steps - int(state.step)) < len(batches.tokens):
        raise InputError(f"batches: found {len(batches.tokens)} steps, expected at most {left} of {config.steps}")
    if (mesh := mesh_of(state.model)) is None:
        return _run(Given(config, jax.tree.map(jnp.asarray, batches), None), state)
    return _run(Given(config, sharding.place_batch(batches, mesh, 2), mesh), state)


def fit(state: TrainState, batches: Iterable[Batch], config: TrainConfig) -> Iterator[tuple[TrainState, StepMetrics]]:
    """Train over an iterator of batches, each as `run` takes it, to the end of `config.steps`.

    Yields after every item; the state yielded before is then gone (donated). Raises NotFinite at the first bad step.
    """
    batches = iter(batches)
    while (left := config.steps - int(state.step)) > 0:
        item = next(batches, None)
        if item is None:
            return
        state, metrics = run(state, jax.tree.map(lambda leaf: leaf[:left], item), config)
        if int(state.bad_step) >= 0:
            raise NotFinite(state)
        yield state, metrics


@eqx.filter_jit(donate="all-except-first")
def _run(given: Given, state: TrainState) -> tuple[TrainState, StepMetrics]:
    config, batches, mesh = given
    arrays, static = eqx.partition(state, eqx.is_array)

    def turn(arrays, batch):
        new, metrics = step(eqx.combine(arrays, static), batch, config, mesh)
        return eqx.filter(sharding.kept(new, mesh), eqx.is_array), metrics

    arrays, metrics = lax.scan(turn, arrays, batches)
    return eqx.combine(arrays, static), metrics
