"""Sweeps: many states of one shape as one, trained at once."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sae.errors import InputError
from sae.training.state import TrainState


def stack(states: Sequence[TrainState]) -> TrainState:
    """Many states of one shape as one, to train at once; they may differ in seed, hyper, centring and scale."""
    structures = {str(jax.tree.structure(state)) for state in states}
    if len(structures) != 1:
        raise InputError(f"states: found {len(structures)} different forms or sizes, expected one or more of one form")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstack(state: TrainState) -> list[TrainState]:
    """The members of a stack."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(state.step.shape[0])]
