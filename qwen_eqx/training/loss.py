"""What training minimizes: the weighted mean of −log p of each token given those before it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from qwen_eqx.model.qwen import Qwen
from qwen_eqx.training.products import trained

LOGITS_AT_ONCE = 2**26  # numbers; more positions than that go piece by piece, and their logits are made again


class Batch(eqx.Module):
    """Documents, padded on the right; what is padded has weight 0."""

    tokens: Int[Array | np.ndarray, "*lead batch seq"]
    weights: Float32[
        Array | np.ndarray, "*lead batch seq"
    ]  # of predicting this token from those before it; the first has none
    answer: Bool[
        Array | np.ndarray, "*lead batch seq"
    ]  # tokens that must all be the likeliest for the document to count as exact


class Totals(eqx.Module):
    """Sums of documents, one of each or over many: they add up."""

    loss: Float32[Array, "*lead"]  # Σ weight · −log p
    weight: Float32[Array, "*lead"]
    exact: Float32[Array, "*lead"]  # documents whose whole answer greedy decoding would write
    documents: Float32[Array, "*lead"]  # that have an answer

    def mean(self) -> Float32[Array, "*lead"]:
        """Σ weight · −log p / Σ weight, in nats; 0 where nothing has weight."""
        return self.loss / jnp.where(self.weight > 0, self.weight, 1)

    def exact_rate(self) -> Float32[Array, "*lead"]:
        """The share of documents that are exact."""
        return self.exact / jnp.where(self.documents > 0, self.documents, 1)


def cast(model: Any, dtype: DTypeLike) -> Any:
    """The same tree with its floating arrays in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, model)


def totals(
    model: Qwen, batch: Batch, *, dtype: DTypeLike = jnp.float32, remat: bool = False, mesh: Mesh | None = None
) -> Totals:
    """The sums of each document of a [batch, seq], computed in `dtype` and summed in float32, on one device or a mesh."""
    computing = cast(model, dtype)
    if jnp.dtype(dtype) == jnp.bfloat16:  # float32 products over rows are nearly as fast as the others
        computing = trained(computing)
    tokens, weights, answer = (jnp.asarray(leaf) for leaf in (batch.tokens, batch.weights, batch.answer))
    x = computing.read(tokens[:, :-1], remat=remat)
    targets, weights, answer = tokens[:, 1:], weights[:, 1:], answer[:, 1:]
    surprise, right = _surprise(computing, x.reshape(-1, x.shape[-1]), targets.reshape(-1), mesh)
    answered = answer.any(axis=1)
    exact = jnp.all(right.reshape(answer.shape) | ~answer, axis=1) & answered
    loss = jnp.sum(weights * surprise.reshape(weights.shape), axis=1)
    return Totals(loss, jnp.sum(weights, axis=1), exact.astype(jnp.float32), answered.astype(jnp.float32))


def _surprise(
    model: Qwen, x: Float[Array, "positions d_model"], targets: Int[Array, " positions"], mesh: Mesh | None
) -> tuple[Float32[Array, " positions"], Bool[Array, " positions"]]:
    """−log p of each target in nats, and whether it is the likeliest token."""

    def piece(model: Qwen, x: Array, targets: Array) -> tuple[Array, Array]:
        logits = model.logits(x)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen, chosen >= logits.max(axis=1)

    rows = 1 if mesh is None else mesh.shape["data"]
    positions, size = len(targets), rows * max(1, LOGITS_AT_ONCE // model.config.vocab)
    if positions <= size:
        return piece(model, x, targets)
    pieces = -(-positions // size)
    room = pieces * size - positions
    xs = jnp.pad(x, ((0, room), (0, 0))).reshape(pieces, size, -1)
    each = jnp.pad(targets, (0, room)).reshape(pieces, size)
    if mesh is not None:  # the rows of each piece are shared, for pieces are made one after another
        xs, each = jax.lax.with_sharding_constraint((xs, each), NamedSharding(mesh, P(None, "data")))
    again = eqx.filter_checkpoint(piece)
    surprise, right = jax.lax.map(lambda one: again(model, *one), (xs, each))
    return surprise.reshape(-1)[:positions], right.reshape(-1)[:positions]
