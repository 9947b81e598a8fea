"""The local replacement model: what transcoders and their errors write in place of every MLP, over one sequence."""

import dataclasses
import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import qwen_eqx
import sae
from qwen_eqx.model.frozen import Frozen, Passed, Stream, freeze
from qwen_eqx.model.sites import Site
from qwen_eqx.text.ids import bucket
from qwen_lab.circuits.nodes import Features
from qwen_lab.errors import InputError

GATHERED = 60  # products with a row that take as long as bringing the stream of its position there
NORMED, PLAIN = "mlp_in", "resid_mid"  # what transcoders may read


class Sources(eqx.Module):
    """All that is written where MLPs write: blocks of rows that share a position, early ones first; empty rows are zero."""

    position: Int[Array, "layers blocks"]
    rows: Float[Array, "layers blocks width d_model"]
    embed: Float[Array, "seq d_model"]

    def __call__(self, layer: Int[Array, ""], g: Stream, blocks: int) -> Float[Array, "targets blocks width"]:
        """By how much each row of a layer's first blocks moves each target, g · row; g may end before the sequence."""
        begin = (layer, *jnp.zeros(3, jnp.int32))
        rows = jax.lax.dynamic_slice(self.rows, begin, (1, blocks, *self.rows.shape[2:]))[0]
        at = jnp.minimum(self.position[layer, :blocks], g.shape[1] - 1)
        return jnp.einsum("tnm,nwm->tnw", g[:, at], rows)

    def blocks_before(self, end: int) -> int:
        """How many of a layer's blocks stand before a position, in the layer that has most."""
        return int((np.asarray(self.position) < end).sum(axis=1).max())


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A sequence's pass with the MLPs replaced: Σ_f z_f d_f + bias + skip(x) + error is what each of them wrote.

    Sources are numbered: features, errors (layer by layer), tokens, and last, as one, all that never changes: the
    transcoders' biases, and whole MLP outputs before position `first`, where there are neither features nor errors.
    """

    tokens: list[int]
    frozen: Frozen
    passed: Passed
    features: Features
    sources: Sources
    numbers: Int[np.ndarray, "layers rows"]  # the source of each row, flattened; −1 where the row is empty
    made: Float[np.ndarray, "layers seq d_model"]  # what the transcoders write, without errors
    normed: bool  # they read the norm's output, not the stream

    @property
    def seq(self) -> int:
        return len(self.tokens)

    @property
    def layers(self) -> int:
        return self.frozen.layers

    @property
    def errors_from(self) -> int:
        return len(self.features)

    @property
    def tokens_from(self) -> int:
        return self.errors_from + self.layers * self.seq

    @property
    def constant(self) -> int:
        """The number of the last source."""
        return self.tokens_from + self.seq

    def edits(self, errors: bool = True) -> list[qwen_eqx.AbstractEdit]:
        """The replacement as edits of the model; with errors no logit changes."""
        pads = ((0, 0), (0, bucket(self.seq) - self.seq), (0, 0))  # a pass reads pads too
        padded = jnp.asarray(np.pad(self.made, pads))
        given = [(qwen_eqx.Given(rows), str(Site(n, "mlp_out"))) for n, rows in enumerate(padded)]
        return [qwen_eqx.Replace(rows, error_of=rows if errors else None, site=site) for rows, site in given]

    def reading(self, position: Int[np.ndarray, " n"], layer: Int[np.ndarray, " n"], rows: Array) -> Array:
        """Encoder rows as readings of the stream between attention and MLP, at these places."""
        if not self.normed:
            return rows
        return rows * self.frozen.mlp_gain[layer] * self.frozen.mlp_scale[layer, position][:, None]


def replace(model: qwen_eqx.Qwen, transcoders: sae.Transcoders, tokens: Sequence[int], first: int = 1) -> Replacement:
    """The local replacement model of this sequence; positions before `first` keep their MLPs."""
    config, normed = model.config, reads_norm(transcoders)
    if (transcoders.n_layers, transcoders.d_model) != (config.layers, config.d_model):
        found = f"{transcoders.n_layers} layers of width {transcoders.d_model}"
        raise InputError(f"transcoders: found {found}, expected the model's {config.layers} of width {config.d_model}")
    frozen, passed = freeze(model, tokens)
    read = reads(frozen, passed, normed)
    features = _fired(transcoders, read, first)
    by_skip, skips = np.zeros(passed.mid.shape, np.float32), skipping(transcoders)
    if skips is not None:
        frozen = frozen.with_skip(skips, normed)
        by_skip = np.asarray(jnp.einsum("lsm,lmo->lso", read, skips))
    held = np.asarray(passed.mlp_out) - by_skip
    counts = np.stack([_counted(transcoders, features, layer, len(tokens), first) for layer in range(frozen.layers)])
    table = _Table(counts, transcoders.d_model)
    constant = len(features) + (frozen.layers + 1) * len(tokens)
    made = np.zeros_like(held)
    for layer in range(frozen.layers):
        rows, position, number = _written(transcoders, features, layer)
        made[layer] = _summed(rows, position, len(tokens))
        bias = np.broadcast_to(np.asarray(transcoders.bias(layer), np.float32), held[layer].shape)
        made[layer, first:] += bias[first:]
        made[layer, :first] = held[layer, :first]  # not replaced
        error = held[layer] - made[layer]
        never = np.where(np.arange(len(tokens))[:, None] < first, held[layer], bias)
        places = np.arange(len(tokens))
        errors = len(features) + layer * len(tokens) + places[first:]
        table.fill(
            layer,
            np.concatenate([rows, error[first:], never]),
            np.concatenate([position, places[first:], places]),
            np.concatenate([number, errors, np.full(len(tokens), constant)]),
        )
    sources, numbers = table.packed(passed.embed)
    return Replacement(list(map(int, tokens)), frozen, passed, features, sources, numbers, made + by_skip, normed)


def reads_norm(transcoders: sae.Transcoders) -> bool:
    """Whether they read what the MLP's norm puts out, rather than the stream before it; raises for other places."""
    sites = [Site.spelled(f"blocks.0.{site}") for site in (transcoders.input_site, transcoders.output_site)]
    reads, writes = (None if site is None else site.kind for site in sites)
    if reads not in (NORMED, PLAIN) or writes != "mlp_out":
        found = f"'{transcoders.input_site}' to '{transcoders.output_site}'"
        raise InputError(f"transcoders: found {found}, expected hook_resid_mid or mlp.hook_in to hook_mlp_out")
    return reads == NORMED


def skipping(transcoders: sae.Transcoders) -> Float[Array, "layers d_model d_model"] | None:
    """The skips of all layers, zero where there is none; None where no layer has one."""
    skips = [transcoders.skip(layer) for layer in range(transcoders.n_layers)]
    if all(skip is None for skip in skips):
        return None
    none = jnp.zeros((transcoders.d_model, transcoders.d_model), jnp.float32)
    return jnp.stack([none if skip is None else skip for skip in skips])


@eqx.filter_jit
def reads(frozen: Frozen, passed: Passed, normed: bool) -> Float[Array, "layers seq d_model"]:
    """What the transcoders read in this pass: the stream, or what the MLPs' norms put out."""
    return passed.mid * frozen.mlp_scale[:, :, None] * frozen.mlp_gain[:, None] if normed else passed.mid


def _fired(transcoders: sae.Transcoders, read: Float[Array, "layers seq d_model"], first: int) -> Features:
    found = []
    for layer in range(transcoders.n_layers):
        z = np.asarray(transcoders.encode(layer, read[layer]), np.float32)  # one layer's at a time: they are wide
        z = np.where(np.arange(len(z))[:, None] < first, np.float32(0), z)
        position, latent = np.nonzero(z > 0)
        found.append((np.full(len(position), layer), position, latent, z[position, latent]))
    return Features(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _written(
    transcoders: sae.Transcoders, features: Features, layer: int
) -> tuple[Float[np.ndarray, "rows d_model"], Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """What features write at a layer's MLP output, where, and which features: its own, and earlier ones' across layers."""
    rows, numbers = [np.zeros((0, transcoders.d_model), np.float32)], [np.zeros(0, np.int64)]
    for origin in range(0 if transcoders.crosses else layer, layer + 1):
        of_layer = np.flatnonzero(features.layer == origin)
        latents, inverse = np.unique(features.latent[of_layer], return_inverse=True)
        chosen = np.asarray(transcoders.decoder_rows(origin, latents)[:, layer - origin])[inverse]
        rows.append(chosen * features.value[of_layer, None])
        numbers.append(of_layer)
    number = np.concatenate(numbers)
    return np.concatenate(rows), features.position[number], number


def _summed(rows: np.ndarray, position: np.ndarray, seq: int) -> Float[np.ndarray, "seq d_model"]:
    """The sum of the rows of each position."""
    order = np.argsort(position, kind="stable")
    begins = np.flatnonzero(np.diff(position[order], prepend=-1))
    total = np.zeros((seq, rows.shape[1]), np.float32)
    if len(rows):
        total[position[order][begins]] = np.add.reduceat(rows[order], begins, axis=0)
    return total


def _counted(
    transcoders: sae.Transcoders, features: Features, layer: int, seq: int, first: int
) -> Int[np.ndarray, " seq"]:
    """How many rows each position of a layer has: of features, an error, and what never changes."""
    here = features.layer <= layer if transcoders.crosses else features.layer == layer
    return np.bincount(features.position[here], minlength=seq) + 1 + (np.arange(seq) >= first)


class _Table:
    """Rows packed into blocks that share a position, a layer at a time: all of them together fill gigabytes once."""

    def __init__(self, counts: Int[np.ndarray, "layers seq"], d_model: int):
        self.counts, self.width = counts, _width(counts)
        self.blocks = -(-counts // self.width)  # of each position
        layers, most = len(counts), int(self.blocks.sum(axis=1).max())
        self.position = np.full((layers, most), counts.shape[1] - 1, np.int32)
        self.rows = _aligned(layers, most * self.width, d_model)
        self.numbers = np.full((layers, most * self.width), -1, np.int64)

    def fill(self, layer: int, rows: np.ndarray, position: np.ndarray, number: np.ndarray) -> None:
        order, count, blocks = np.argsort(position, kind="stable"), self.counts[layer], self.blocks[layer]
        slots = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        slots += np.repeat(self.width * (np.cumsum(blocks) - blocks), count)
        self.rows[layer, slots], self.numbers[layer, slots] = rows[order], number[order]
        self.position[layer, : blocks.sum()] = np.repeat(np.arange(len(count)), blocks)

    def packed(self, embed: Array) -> tuple[Sources, Int[np.ndarray, "layers rows"]]:
        rows = self.rows.reshape(*self.position.shape, self.width, -1)
        return Sources(jnp.asarray(self.position), jax.device_put(rows), jax.device_put(embed)), self.numbers


def _aligned(*shape: int) -> Float[np.ndarray, "layers rows d_model"]:
    """Zeros that begin where XLA wants them: on CPU it takes these as they are, and copies others."""
    size = 4 * math.prod(shape)
    room = np.zeros(size + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + size].view(np.float32).reshape(shape)


def _width(counts: Int[np.ndarray, "layers seq"]) -> int:
    """Rows of a block: few, and streams are gathered for many blocks; many, and most rows are empty."""
    widths = range(8, max(9, int(counts.max()) + 8), 8)
    return min(widths, key=lambda width: np.sum(-(-counts // width), axis=1).max() * (width + GATHERED))
