"""Whole items through the model at once, compiled once for each bucket of lengths: what stands at each position."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

import qwen_eqx
from qwen_eqx.model.room import check_room, free_device_bytes
from qwen_eqx.model.sites import Recorder, Site
from qwen_eqx.text.ids import bucket, pad_right

_POSITIONS = 16  # logits are made for so many positions at a time: those of a whole answer would be gigabytes


class Pass(NamedTuple):
    """What one pass computed; right of a row's end stands what belongs to nobody."""

    values: tuple[Float[Array | np.ndarray, "batch width d_model"], ...]  # of each site
    norms: Float32[Array | np.ndarray, "sites batch width"]
    finite: Bool[Array | np.ndarray, "sites batch width"]
    best: Int32[
        Array | np.ndarray, "batch new"
    ]  # the most probable token after each position from the prompt's last on
    log_probs: Float32[Array | np.ndarray, "batch new"]  # its logarithm


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads items of one width together, in batches of a size that the width alone decides.

    So a row's bits depend on the item and on no other: short batches are filled with rows that are thrown away.
    """

    model: qwen_eqx.Qwen
    sites: tuple[Site, ...]
    together: int  # tokens of a batch

    def width(self, tokens: int) -> int:
        return min(bucket(tokens), max(self.model.config.max_seq, tokens))

    def rows(self, width: int) -> int:
        return max(1, self.together // width)

    def check_room(self, longest: int) -> None:
        """Raises if two batches of what is kept, one computed while the other is looked at, do not fit in memory."""
        width = self.width(longest)
        each = sum(site.width(self.model.config) for site in self.sites) * self.model.dtype.itemsize
        needed = 2 * self.rows(width) * width * each
        what = f"two batches of activations, {needed / 1e6:,.1f} MB,"
        lower = "the length of items, the tokens read together or the number of sites"
        check_room(what, needed, free_device_bytes(), lower)

    def start(self, items: Sequence[Sequence[int]], width: int, prompts: Sequence[int] = (), new: int = 0) -> Pass:
        """Begins a pass; its arrays are waited for when they are looked at.

        With `new`, the choices at so many positions from the last one of each of `prompts`.
        """
        rows = self.rows(width)
        filled = [*items, *[[0]] * (rows - len(items))]
        last = np.asarray([*(length - 1 for length in prompts), *[0] * (rows - len(prompts))], np.int32)
        return _pass(self.model, pad_right(filled, width, 0), last, self.sites, new)


@functools.partial(jax.jit, static_argnames=("sites", "new"))
def _pass(
    model: qwen_eqx.Qwen,
    tokens: Int[Array, "batch width"],
    last: Int[Array, " batch"],
    sites: tuple[Site, ...],
    new: int,
) -> Pass:
    recorder = Recorder(sites)
    x = model.read(tokens, tap=recorder)
    values = tuple(recorder.values[site] for site in sites)
    wide = [value.astype(jnp.float32) for value in values]  # squares of bf16 lose bits, and overflow
    best, log_probs = _choices(model, x, last, new)
    return Pass(
        values,
        jnp.stack([jnp.linalg.norm(value, axis=-1) for value in wide]),
        jnp.stack([jnp.isfinite(value).all(axis=-1) for value in wide]),
        best,
        log_probs,
    )


def _choices(
    model: qwen_eqx.Qwen, x: Float[Array | np.ndarray, "batch width d_model"], last: Int[Array, " batch"], new: int
) -> tuple[Int32[Array, "batch new"], Float32[Array, "batch new"]]:
    if not new:
        return jnp.zeros((len(x), 0), jnp.int32), jnp.zeros((len(x), 0), jnp.float32)
    steps = -(-new // _POSITIONS) * _POSITIONS
    places = last[:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
    chosen = jnp.take_along_axis(x, jnp.minimum(places, x.shape[1] - 1)[:, :, None], axis=1)
    pieces = jnp.moveaxis(chosen.reshape(len(x), -1, _POSITIONS, x.shape[2]), 1, 0)

    def one(piece: Float[Array, "batch some d_model"]) -> tuple[Array, Array]:
        logits = model.logits(piece)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits.max(axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    best, log_probs = jax.lax.map(one, pieces)
    return tuple(jnp.moveaxis(each, 0, 1).reshape(len(x), steps)[:, :new] for each in (best, log_probs))  # pyright: ignore
