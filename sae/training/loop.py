"""Training: `init` a state, `run` many steps per compiled call, `finish` into a module for raw activations.

    state = train.init(sae.TopK.init(...), config, sample)
    for state, metrics in train.fit(state, batches, config):   # batches: any iterator of device arrays
        ...                                                    # log, save a checkpoint, stop
    module = train.finish(state)

Many of one shape at once: `train.stack([state, state, ...])` and the same calls; `train.unstack` takes them apart.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from sae.errors import InputError
from sae.forms.abstract import AbstractSAE
from sae.forms.models import BatchTopK, Matryoshka, TopK
from sae.forms.objectives import Hyper
from sae.training.state import Metrics as Metrics
from sae.training.state import TrainConfig as TrainConfig
from sae.training.state import TrainState as TrainState
from sae.training.step import adam
from sae.training.step import step as step


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


def init(
    module: AbstractSAE,
    config: TrainConfig,
    sample: Float[Array, "rows d_model"],
    target: Float[Array, "rows d_out"] | None = None,
) -> TrainState:
    """A state whose centring and scale come from `sample` (and `target`, what a transcoder writes)."""
    if target is None and module.d_out != module.d_model:
        raise InputError(f"target: found none, expected rows of d_out={module.d_out} for a transcoder")
    module = module.balanced() if config.frees(module) else module
    mean, scale = _standardize(sample, config)
    mean_out, scale_out = (mean, scale) if target is None else _standardize(target, config)
    if config.bias_start == "median":
        rows = ((sample if target is None else target).astype(jnp.float32) - mean_out[None]) * scale_out
        module = eqx.tree_at(lambda m: m.b_dec, module, geometric_median(rows))
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


def hyper(module: AbstractSAE, config: TrainConfig, k: float | None = None) -> Hyper:
    """The numbers that a sweep may vary, from a config; `k` lowers a form's own."""
    k = getattr(module, "k", 0) if k is None else k
    numbers = config.learning_rate, config.sparsity, config.target_l0, k, config.aux, config.bandwidth
    return Hyper(*(jnp.float32(number) for number in numbers))


def run(
    state: TrainState,
    x: Float[Array, "steps *sites batch d_model"],
    config: TrainConfig,
    y: Float[Array, "steps *sites batch d_out"] | None = None,
    at_once: int | None = None,
    sites: Int[Array, "*members 2"] | None = None,
) -> tuple[TrainState, Metrics]:
    """One compiled call of x.shape[0] steps; `state` is donated.

    Of a stack all members see the same batches. With a sites axis member i reads x[:, sites[i, 0]] and writes
    y[:, sites[i, 1]] (x's where there is no y), or without `sites` its own number of both. `at_once` of them train
    in one vmap: all on an accelerator; on CPU one after another, where a batched gather is slower than single ones.
    """
    if x.ndim == 4 and sites is None:
        sites = jnp.stack([jnp.arange(x.shape[1], dtype=jnp.int32)] * 2, axis=-1)
    if sites is not None and (x.ndim != 4 or sites.shape != (*state.step.shape, 2)):
        found = f"shape {sites.shape} with x of {x.ndim} axes"
        raise InputError(
            f"sites: found {found}, expected {(*state.step.shape, 2)} and x of steps, sites, batch, d_model"
        )
    return _run((config, x, y, sites, at_once), state)


def fit(
    state: TrainState,
    batches: Iterable[Any],
    config: TrainConfig,
    at_once: int | None = None,
    sites: Int[Array, "*members 2"] | None = None,
) -> Iterator[tuple[TrainState, Metrics]]:
    """Train over an iterator of device arrays: `batch d_model` or `steps *sites batch d_model`, or pairs (x, y) of them.

    Yields after every item; the state yielded before is then gone (donated). Raises NotFinite at the first bad step.
    """
    for item in batches:
        x, y = item if isinstance(item, tuple) else (item, None)
        if x.ndim == 2:
            x, y = x[None], None if y is None else y[None]
        state, metrics = run(state, x, config, y, at_once, sites)
        if int(jnp.max(state.bad_step)) >= 0:
            raise NotFinite(state)
        yield state, metrics


def finish(state: TrainState) -> AbstractSAE:
    """The trained module for raw activations: the average if one is kept, rows of length 1, centring and scale in it."""
    module = state.module if state.average is None else state.average
    module = module.unit_rows() if module.unit_norm else module
    if isinstance(module, TopK | BatchTopK | Matryoshka) and int(state.hyper.k) < module.k:
        module = dataclasses.replace(module, k=int(state.hyper.k))
    return module.fold(state.scale, state.mean, state.scale_out, state.mean_out)


def stack(states: Sequence[TrainState]) -> TrainState:
    """Many states of one shape as one, to train at once; they may differ in seed, hyper, centring and scale."""
    structures = {str(jax.tree.structure(state)) for state in states}
    if len(structures) != 1:
        raise InputError(f"states: found {len(structures)} different forms or sizes, expected one or more of one form")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstack(state: TrainState) -> list[TrainState]:
    """The members of a stack."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(state.step.shape[0])]


def geometric_median(rows: Float[Array, "rows width"], iterations: int = 64) -> Float[Array, " width"]:
    """argmin_m Σ‖row − m‖ by Weiszfeld's iteration from the mean."""

    def closer(_, median):
        weights = 1.0 / jnp.maximum(jnp.linalg.norm(rows - median[None], axis=-1), 1e-8)
        return jnp.einsum("r,rw->w", weights / jnp.sum(weights), rows)

    return lax.fori_loop(0, iterations, closer, jnp.mean(rows, axis=0))


@eqx.filter_jit(donate="all-except-first")
def _run(data, state: TrainState) -> tuple[TrainState, Metrics]:
    config, x, y, sites, at_once = data

    def member(state, site):
        def turn(state, batch):
            read, write = batch[0], batch[-1]
            if site is not None:
                read, write = read[site[0]], write[site[1]]
            return step(state, read, write, config)

        return lax.scan(turn, state, (x,) if y is None else (x, y))

    if state.step.ndim == 0:
        return member(state, sites)
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else state.step.shape[0]
    if at_once > 1:
        return lax.map(lambda one: member(*one), (state, sites), batch_size=at_once)

    def in_turn(state, place):  # carried, so that members are replaced where they are: lax.map would hold all twice
        at, site = place
        one, metrics = member(jax.tree.map(lambda leaf: leaf[at], state), site)
        return jax.tree.map(lambda leaf, new: leaf.at[at].set(new), state, one), metrics

    return lax.scan(in_turn, state, (jnp.arange(state.step.shape[0]), sites))


def _standardize(rows: Array, config: TrainConfig) -> tuple[Array, Array]:
    rows = rows.astype(jnp.float32)
    mean = jnp.mean(rows, axis=0) if config.centre else jnp.zeros(rows.shape[-1], jnp.float32)
    square = jnp.mean(jnp.sum(jnp.square(rows - mean[None]), axis=-1))
    scale = jnp.where(square > 0, lax.rsqrt(jnp.where(square > 0, square, 1.0)), 1.0)
    return mean, scale if config.rescale else jnp.float32(1)
