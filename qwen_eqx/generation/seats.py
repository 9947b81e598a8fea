"""Sequences that enter their slots: every group of a mesh's devices lays down the prompt it read in a slot of its own."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Key

from qwen_eqx import sharding
from qwen_eqx.generation.engine import GenerationState, Generator, PromptState
from qwen_eqx.model.cache import KVCache
from qwen_eqx.model.qwen import Qwen


class Seats(NamedTuple):
    """For each group of devices the slot among its own that a sequence enters, and its limit."""

    slot: Int32[np.ndarray | Array, " groups"]
    limit: Int32[np.ndarray | Array, " groups"]
    enters: Bool[np.ndarray | Array, " groups"]  # False: none of this group's is free


class Admission(NamedTuple):
    """Prompts that were read, one by each group of devices, and the slots that their next samples get."""

    model: Qwen
    generator: Generator
    prompt: PromptState
    keys: Key[Array, " groups"]
    seats: Seats


@eqx.filter_jit(donate="all-except-first")
def admit(admission: Admission, state: GenerationState) -> GenerationState:
    """Each group's sequence in a slot of its own devices: none of it crosses to others."""
    model, generator, prompt, keys, seats = admission
    new, mesh = generator.begin(model, prompt, keys), generator.settings.mesh
    ends = new.done | (new.length >= seats.limit)
    new = eqx.tree_at(lambda s: (s.limit, s.done), new, (seats.limit, ends))
    if not sharding.deals(len(seats.slot), mesh):
        return generator.dealt(_seated(state, new, seats))
    given = {"state": (state, _specs(state)), "new": (new, _specs(new)), "seats": (seats, sharding.specs(seats))}
    return generator.dealt(sharding.by_rows(_seated, mesh, given, _specs(state)))


def _specs(state: GenerationState) -> Any:
    """Of all that has rows, rows over data."""
    specs, buffer = sharding.specs(state), state.buffer
    if buffer is None:
        return specs
    return eqx.tree_at(lambda s: s.buffer.stored, specs, sharding.rows_at(buffer.rows_axis))


def _seated(state: GenerationState, new: GenerationState, seats: Seats) -> GenerationState:
    """Lays a prompt down in a row so that it ends at the write index, and its first token in the column just written."""
    slot, enters = seats.slot[0], seats.enters[0]
    back, column = state.cache.index - new.cache.index, state.column - new.column

    buffer = state.buffer

    def put(rows: Array, part: Array, *, axis: int = 0, by: Int[Array, ""] = column, along: int | None = None) -> Array:
        part = part if along is None else jnp.roll(part, by, axis=along)
        old = jax.lax.dynamic_slice_in_dim(rows, slot, 1, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(rows, jnp.where(enters, part, old), slot, axis=axis)

    layers = jax.tree.map(lambda rows, part: put(rows, part, by=back, along=2), state.cache.layers, new.cache.layers)
    return GenerationState(
        cache=KVCache(layers, state.cache.index, put(state.cache.length, new.cache.length)),
        token=put(state.token, new.token),
        tokens=put(state.tokens, new.tokens, along=1),
        log_probs=put(state.log_probs, new.log_probs, along=1),
        buffer=buffer
        and jax.tree.map(functools.partial(put, axis=buffer.rows_axis, along=buffer.columns_axis), buffer, new.buffer),
        seen=jax.tree.map(put, state.seen, new.seen),
        column=state.column,
        first=put(state.first, column[None]),
        length=put(state.length, new.length),
        limit=put(state.limit, new.limit),
        done=put(state.done, new.done),
        prompt_length=put(state.prompt_length, new.prompt_length),
        keys=put(state.keys, new.keys),
    )
