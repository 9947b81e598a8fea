"""Attention of whole sequences to themselves, block by block; and with a gradient that keeps no scores, for training."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

MIN_BLOCK = 112  # queries at once: fewer make the products small, more waste the upper triangle
MAX_BLOCKS = 8  # each is code of its own, and 16 are hardly faster
CPU_ROWS, CPU_POSITIONS = 4, 2048  # sequences at once, at most, so that their scores stay in the processor's cache
Folded = Float[Array, "batch kv_heads group seq d_head"]
Keys = Float[Array, "batch kv_heads seq d_head"]


def attend_causally(
    q: Float[Array, "batch seq kv_heads group d_head"],
    k: Float[Array, "batch kv_heads seq d_head"],
    v: Float[Array, "batch kv_heads seq d_head"],
    pads: Int[Array, " batch"] | None = None,
) -> Float[Array, "batch seq kv_heads group d_head"]:
    """softmax(q kᵀ / sqrt(d_head)) v over the keys up to each query, scores and softmax in float32.

    A block of queries reads the keys up to its own end, about half of all scores. Equal to `attend` under a triangular mask
    that hides the first `pads` keys of each row. Without `pads` the gradient makes the scores again from log Σ exp
    (arXiv 2205.14135, algorithm 4), and only reverse mode is there.
    """
    folded = q.transpose(0, 2, 3, 1, 4)
    parts = (folded, k.astype(q.dtype), v.astype(q.dtype), *(() if pads is None else (pads,)))
    attend = _attend if pads is None else lambda *each: _forward(*each)[0]
    batch, most = q.shape[0], max(1, min(CPU_ROWS, CPU_POSITIONS // q.shape[1]))
    rows = max(rows for rows in range(1, most + 1) if batch % rows == 0)
    if jax.default_backend() == "cpu" and rows < batch:
        parts = tuple(part.reshape(-1, rows, *part.shape[1:]) for part in parts)
        mixed = jax.lax.map(lambda each: attend(*each), parts).reshape(folded.shape)
    else:
        mixed = attend(*parts)
    return mixed.transpose(0, 3, 1, 2, 4)


@jax.custom_vjp
def _attend(q: Folded, k: Keys, v: Keys) -> Folded:
    return _forward(q, k, v)[0]


def _forward(q: Folded, k: Keys, v: Keys, pads: Int[Array, " batch"] | None = None) -> tuple[Folded, tuple[Array, ...]]:
    mixed, logs = [], []
    for begin, end in _blocks(q.shape[3]):
        # a finite floor, not -inf: a pad query sees nothing, and its garbage must stay finite
        scores = jnp.where(_seen(begin, end, pads), _scores(q, k, begin, end), jnp.finfo(jnp.float32).min)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        # divided before they are rounded, as `attend` does: the two then round alike
        mixed.append(_product("bkgqs,bksd->bkgqd", (weights / total).astype(q.dtype), v[:, :, :end]))
        logs.append(top + jnp.log(total))
    z, log = jnp.concatenate(mixed, axis=3), jnp.concatenate(logs, axis=3)
    return z.astype(q.dtype), (q, k, v, z, log)


def _backward(kept: tuple[Array, ...], dz: Folded) -> tuple[Folded, Keys, Keys]:
    q, k, v, z, log = kept
    inner = (dz.astype(jnp.float32) * z).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for begin, end in _blocks(q.shape[3]):
        at = slice(begin, end)
        weights = jnp.where(_seen(begin, end), jnp.exp(_scores(q, k, begin, end) - log[:, :, :, at]), 0)
        of_weights = _product("bkgqd,bksd->bkgqs", dz[:, :, :, at], v[:, :, :end])
        of_scores = (weights * (of_weights - inner[:, :, :, at]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dq.append(_product("bkgqs,bksd->bkgqd", of_scores, k[:, :, :end]))
        dk = dk.at[:, :, :end].add(_product("bkgqs,bkgqd->bksd", of_scores, q[:, :, :, at]))
        dv = dv.at[:, :, :end].add(_product("bkgqs,bkgqd->bksd", weights.astype(q.dtype), dz[:, :, :, at]))
    return jnp.concatenate(dq, axis=3).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_forward, _backward)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(q: Folded, k: Keys, begin: int, end: int) -> Float32[Array, "batch kv_heads group queries keys"]:
    return _product("bkgqd,bksd->bkgqs", q[:, :, :, begin:end], k[:, :, :end]) * q.shape[-1] ** -0.5


def _blocks(seq: int) -> list[tuple[int, int]]:
    size = max(MIN_BLOCK, -(-seq // MAX_BLOCKS))
    return [(begin, min(begin + size, seq)) for begin in range(0, seq, size)]


def _seen(begin: int, end: int, pads: Int[Array, " batch"] | None = None) -> Bool[Array, "_ 1 1 queries keys"]:
    keys = jnp.arange(end)
    causal = (keys[None, :] <= jnp.arange(begin, end)[:, None])[None, None, None]
    return causal if pads is None else causal & (keys[None, :] >= pads[:, None])[:, None, None, None, :]
