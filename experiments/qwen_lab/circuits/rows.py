"""Rows of the adjacency: the direct effect of every source on a target, by one sweep down the frozen model."""

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen_eqx.model.frozen import Frozen, Targets
from qwen_lab.circuits.replacement import Replacement, Sources

STEP = 256  # positions by which sweeps differ in length: each length is compiled for itself
LENGTHS = 4  # at most


def ends(seq: int) -> list[int]:
    """The lengths that sweeps have, the last being all of the sequence."""
    step = max(STEP, -(-seq // LENGTHS))
    return [*range(step, seq, step), seq]


def batches(
    layer: Int[np.ndarray, " targets"], position: Int[np.ndarray, " targets"], size: int, seq: int
) -> Iterator[Int[np.ndarray, " batch"]]:
    """Targets side by side that lie together, for a sweep goes as deep as its deepest and as far as its latest one."""
    count = -(-len(layer) // size)
    bands = min(len(ends(seq)), max(1, round(count**0.5)))
    wide = size * -(-count // bands)
    late = np.argsort(position, kind="stable")
    for begin in range(0, len(late), wide):
        band = late[begin : begin + wide]
        deep = band[np.argsort(layer[band], kind="stable")]
        yield from (deep[at : at + size] for at in range(0, len(deep), size))


def direct_effects(
    replacement: Replacement,
    layer: Int[np.ndarray, " targets"],
    position: Int[np.ndarray, " targets"],
    vector: Float[Array, "targets d_model"],
    batch: int,
) -> Float[np.ndarray, "targets sources"]:
    """What each source adds to vector · x at each target's place; the last column is what no source adds.

    A row's sum is the reading itself. Targets are padded to `batch`, so one compilation serves all of a sequence that
    reach as far.
    """
    missing, sources = batch - len(layer), replacement.sources
    targets = Targets(
        jnp.asarray(np.pad(layer, (0, missing), constant_values=-1), jnp.int32),
        jnp.asarray(np.pad(position, (0, missing)), jnp.int32),
        jnp.pad(jnp.asarray(vector, jnp.float32), ((0, missing), (0, 0))),
    )
    end = next(length for length in ends(replacement.seq) if length > position.max())
    with jax.default_matmul_precision(
        "highest"
    ):  # a GPU's default rounds float32 to 10 bits, and rows no longer add up
        found = swept(replacement.frozen, sources, targets, end, sources.blocks_before(end))
    of_rows, of_tokens, constant = (np.asarray(part) for part in found)
    effects = np.zeros((len(layer), replacement.constant + 1), np.float32)
    reached = np.repeat(np.asarray(sources.position)[:, : of_rows.shape[2]] < end, of_rows.shape[3], axis=1)
    for level in range(min(layer.max(), replacement.layers)):  # deeper ones write after all targets have read
        flat = of_rows[level].reshape(batch, -1)[: len(layer)]
        numbers = np.where(reached[level], replacement.numbers[level, : flat.shape[1]], -1)
        held = numbers == replacement.constant
        effects[:, -1] += flat[:, held].sum(axis=1)
        kept = np.flatnonzero((numbers >= 0) & ~held)
        effects[:, numbers[kept]] += flat[:, kept]  # within a layer each source has one row
    effects[:, replacement.tokens_from : replacement.tokens_from + end] = of_tokens[: len(layer)]
    effects[:, -1] += constant[: len(layer)]
    return effects


@eqx.filter_jit
def swept(
    frozen: Frozen, sources: Sources, targets: Targets, end: int, blocks: int
) -> tuple[Float[Array, "layers targets blocks width"], Float[Array, "targets seq"], Float[Array, " targets"]]:
    """The effects of every row and every token before `end`, and the constants: one compiled sweep of a batch."""
    of_rows, g, constant = frozen.pull(targets, lambda layer, g: sources(layer, g, blocks), end)
    return of_rows, jnp.einsum("tsm,sm->ts", g, sources.embed[:end]), constant
