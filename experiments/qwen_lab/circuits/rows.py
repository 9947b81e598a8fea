"""Rows of the adjacency: the direct effect of every source on a target, by one sweep down the frozen model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen_eqx.model.frozen import Frozen, Targets
from qwen_lab.circuits.replacement import Replacement, Sources


def direct_effects(
    replacement: Replacement,
    layer: Int[np.ndarray, " targets"],
    position: Int[np.ndarray, " targets"],
    vector: Float[Array, "targets d_model"],
    batch: int,
) -> Float[np.ndarray, "targets sources"]:
    """What each source adds to vector · x at each target's place; the last column is what no source adds.

    A row's sum is the reading itself. Targets are padded to `batch`, so one compilation serves all of a sequence.
    """
    missing = batch - len(layer)
    targets = Targets(
        jnp.asarray(np.pad(layer, (0, missing), constant_values=-1), jnp.int32),
        jnp.asarray(np.pad(position, (0, missing)), jnp.int32),
        jnp.pad(jnp.asarray(vector, jnp.float32), ((0, missing), (0, 0))),
    )
    with jax.default_matmul_precision(
        "highest"
    ):  # a GPU's default rounds float32 to 10 bits, and rows no longer add up
        found = swept(replacement.frozen, replacement.sources, targets)
    of_rows, of_tokens, constant = (np.asarray(part) for part in found)
    effects = np.zeros((len(layer), replacement.constant + 1), np.float32)
    for numbers, values in zip(replacement.numbers, of_rows, strict=True):
        flat = values.reshape(batch, -1)[: len(layer)]
        held = numbers == replacement.constant
        effects[:, -1] += flat[:, held].sum(axis=1)
        kept = np.flatnonzero((numbers >= 0) & ~held)
        effects[:, numbers[kept]] += flat[:, kept]  # within a layer each source has one row
    effects[:, replacement.tokens_from : replacement.constant] = of_tokens[: len(layer)]
    effects[:, -1] += constant[: len(layer)]
    return effects


@eqx.filter_jit
def swept(
    frozen: Frozen, sources: Sources, targets: Targets
) -> tuple[Float[Array, "layers targets blocks width"], Float[Array, "targets seq"], Float[Array, " targets"]]:
    """The effects of every row and every token, and the constants: one compiled sweep of a batch."""
    of_rows, g, constant = frozen.pull(targets, sources)
    return of_rows, jnp.einsum("tsm,sm->ts", g, sources.embed), constant
