"""Training: many steps per compiled call, over any iterator of device arrays.

    state = training.init(sae.TopK.init(...), config, sample)
    for state, metrics in training.fit(state, batches, config):
        ...                                                    # log, save a checkpoint, stop
    module = training.finish(state)

Many of one shape at once: `training.stack([state, state, ...])` and the same calls; `training.unstack` takes them apart.
Many devices: `training.place(state, mesh)` and the same calls.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from sae.codes import across
from sae.errors import InputError
from sae.training import sharding
from sae.training.config import TrainConfig
from sae.training.state import StepMetrics, TrainState
from sae.training.step import step


class NotFinite(ArithmeticError):
    """A loss was not finite: `step` of the first, `members` of a stack that have one; `state` is the last good state."""

    def __init__(self, state: TrainState):
        bad = np.asarray(state.bad_step)
        self.state, self.step = state, int(bad[bad >= 0].min())
        self.members = tuple(int(member) for member in np.flatnonzero(bad >= 0)) if bad.ndim else ()
        first = [member for member in self.members if bad[member] == self.step]
        rest = len(self.members) - len(first)
        who = f", member {', '.join(map(str, first))} of {len(bad)}" if first else ""
        later = f" ({rest} more later)" if rest else ""
        super().__init__(f"step {self.step}{who}: the loss is not finite{later}; the state before it is kept")


class Batches(NamedTuple):
    """What one compiled call trains on, beside the state."""

    config: TrainConfig
    x: Float[Array, "steps ..."]
    y: Float[Array, "steps ..."] | None
    sites: Int[Array, "..."] | None
    at_once: int | None
    mesh: Mesh | None = None


def run(
    state: TrainState,
    x: Float[Array, "steps ..."],
    config: TrainConfig,
    y: Float[Array, "steps ..."] | None = None,
    at_once: int | None = None,
    sites: Int[Array, "..."] | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One compiled call of x.shape[0] steps, no more than are left of `config.steps`; `state` is donated.

    x is `steps batch d_model` (`steps batch sites d_model` for a form that reads several), and of a stack all members
    see the same batches. Or it is `steps sites batch d_model`, and member i reads x[:, sites[i, 0]] and writes
    y[:, sites[i, 1]] (x's where there is no y), or without `sites` its own number of both: `sites` is `*members 2`, or
    `*members 2 n` for a form that reads n. `at_once` of the members train in one vmap: all on an accelerator; on CPU one
    after another, where a batched gather is slower than single ones. A state on a mesh trains there, on rows from anywhere.
    """
    if (left := config.steps - int(jnp.max(state.step))) < x.shape[0]:
        raise InputError(f"x: found {x.shape[0]} steps, expected at most {left}: config.steps is {config.steps}")
    if x.ndim == 4 and _row_axes(state) == 1 and sites is None:
        sites = jnp.stack([jnp.arange(x.shape[1], dtype=jnp.int32)] * 2, axis=-1)
    if sites is not None:
        expected = (*state.step.shape, 2, *state.module.b_dec.shape[state.step.ndim : -1])
        if x.ndim != 4 or sites.shape != expected:
            found = f"shape {sites.shape} with x of {x.ndim} axes"
            raise InputError(f"sites: found {found}, expected {expected} and x of steps, sites, batch, d_model")
    if (mesh := sharding.mesh_of(state)) is None:
        return _run(Batches(config, x, y, sites, at_once, None), state)
    axis = 1 if sites is None else 2
    where = across.by_rows(mesh, x.shape[axis], axis)
    rows = (across.placed(x, where), None if y is None else across.placed(y, where))
    everywhere = None if sites is None else across.placed(sites, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        return _run(Batches(config, *rows, everywhere, at_once, mesh), state)


def _row_axes(state: TrainState) -> int:
    """1, or 2 for a form that reads several sites."""
    return state.module.b_dec.ndim - state.step.ndim


def fit(
    state: TrainState,
    batches: Iterable[Any],
    config: TrainConfig,
    at_once: int | None = None,
    sites: Int[Array, "..."] | None = None,
) -> Iterator[tuple[TrainState, StepMetrics]]:
    """Train over an iterator of device arrays, each as `run` takes it or one batch without the steps, or pairs (x, y).

    Yields after every item; the state yielded before is then gone (donated). Ends after `config.steps`, in the midst of
    an item if need be, and asks for no further one. Raises NotFinite at the first bad step.
    """
    batches = iter(batches)
    while (left := config.steps - int(jnp.max(state.step))) > 0:
        item = next(batches, None)
        if item is None:
            return
        x, y = item if isinstance(item, tuple) else (item, None)
        if x.ndim == 1 + _row_axes(state):
            x, y = x[None], None if y is None else y[None]
        state, metrics = run(state, x[:left], config, None if y is None else y[:left], at_once, sites)
        if int(jnp.max(state.bad_step)) >= 0:
            raise NotFinite(state)
        yield state, metrics


@eqx.filter_jit(donate="all-except-first")
def _run(batches: Batches, state: TrainState) -> tuple[TrainState, StepMetrics]:
    config, at_once = batches.config, batches.at_once

    def member(state: TrainState, sites: Int[Array, "..."] | None):
        def turn(state, batch):
            read, write = batch[0], batch[-1]
            if sites is not None:
                read, write = _at(read, sites[0]), _at(write, sites[1])
            state, metrics = step(state, read, write, config)
            return sharding.kept(state, batches.mesh), metrics

        return lax.scan(turn, state, (batches.x,) if batches.y is None else (batches.x, batches.y))

    if state.step.ndim == 0:
        return member(state, batches.sites)
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else state.step.shape[0]
    if at_once > 1:
        state, metrics = lax.map(lambda one: member(*one), (state, batches.sites), batch_size=at_once)
        return sharding.kept(state, batches.mesh), metrics

    def in_turn(state, place):  # carried, so that members are replaced where they are: lax.map would hold all twice
        at, sites = place
        one, metrics = member(jax.tree.map(lambda leaf: leaf[at], state), sites)
        state = jax.tree.map(lambda leaf, new: leaf.at[at].set(new), state, one)
        return sharding.kept(state, batches.mesh), metrics

    return lax.scan(in_turn, state, (jnp.arange(state.step.shape[0]), batches.sites))


def _at(rows: Float[Array, "sites batch d_model"], chosen: Int[Array, "..."]) -> Float[Array, "batch ..."]:
    """The rows of one site, or of several side by side."""
    return jnp.moveaxis(rows[chosen], -2, 0)
