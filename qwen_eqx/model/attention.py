"""Grouped-query attention: projections, optional q/k norm (Qwen3), RoPE, and the attend function."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from qwen_eqx.model.cache import LayerCache
from qwen_eqx.model.causal import attend_causally
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.layers import Linear, RMSNorm, rounded
from qwen_eqx.model.rope import Rotation
from qwen_eqx.model.sites import BlockTap, asked, unchanged

BLOCK = 256  # entries attended to at once where there are many: 512 and 1,024 are slower by a fifth and by half
Seen = Bool[Array, "batch seq kv_seq"] | Int[Array, " batch"] | None
"""What queries see: a mask; or, without a past, the tokens up to their own but for each row's first so many, its pads;
or, None, all up to their own, read to be trained on."""
Folded = tuple[
    Float32[Array, "batch kv_heads rows"],
    Float32[Array, "batch kv_heads rows"],
    Float32[Array, "batch kv_heads rows d_head"],
]


def attend(
    q: Float[Array, "batch seq kv_heads group d_head"],
    k: Float[Array, "batch kv_heads kv_seq d_head"],
    v: Float[Array, "batch kv_heads kv_seq d_head"],
    mask: Bool[Array, "batch seq kv_seq"],
    tap: BlockTap = unchanged,
) -> Float[Array, "batch seq kv_heads group d_head"]:
    """softmax(q kᵀ / sqrt(d_head) + mask) v, scores and softmax in float32 (transformers `eager_attention_forward`).

    A query that sees nothing, a pad's, gets something finite. Many queries over many entries go block by block, unless
    `tap` asks for the pattern, [batch, heads, seq, kv_seq].
    """
    batch, seq, kv_heads, group, d_head = q.shape
    rows = q.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, seq * group, d_head)  # one product per (row, kv head)
    of_rows = jnp.repeat(mask, group, axis=1)[:, None]
    wanted = asked(tap, "pattern")
    if seq > 1 and k.shape[2] > 2 * BLOCK and not wanted:
        z = blockwise(rows, k, v, of_rows, BLOCK)
    else:
        weights = jax.nn.softmax(_scores(rows, k, of_rows), axis=-1)
        if wanted:
            apart = weights.reshape(batch, kv_heads, seq, group, -1).transpose(0, 1, 3, 2, 4)
            met = tap("pattern", apart.reshape(batch, kv_heads * group, seq, -1))
            weights = met.reshape(apart.shape).transpose(0, 1, 3, 2, 4).reshape(weights.shape)
        z = _weighted(weights, v, q.dtype)
    return z.astype(q.dtype).reshape(batch, kv_heads, seq, group, d_head).transpose(0, 2, 1, 3, 4)


def blockwise(
    rows: Float[Array, "batch kv_heads rows d_head"],
    k: Float[Array, "batch kv_heads kv_seq d_head"],
    v: Float[Array, "batch kv_heads kv_seq d_head"],
    mask: Bool[Array, "batch 1 rows kv_seq"],
    block: int,
) -> Float32[Array, "batch kv_heads rows d_head"]:
    """The same, `block` entries at a time, their scores small enough to stay in the processor's cache (arXiv 2112.05682).

    Carried are m = max(scores), Σ exp(scores − m) and Σ exp(scores − m) v so far; blocks that no query sees are skipped.
    """

    def fold(carry: Folded, k: Array, v: Array, mask: Array) -> Folded:
        top, total, mixed = carry
        scores = _scores(rows, k, mask)
        higher = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.where(mask, jnp.exp(scores - higher[..., None]), 0)
        kept = jnp.exp(top - higher)
        mixed = mixed * kept[..., None] + _weighted(weights, v, rows.dtype)
        return higher, total * kept + weights.sum(axis=-1), mixed

    def step(i: Int[Array, ""], carry: Folded) -> Folded:
        # without the barrier XLA:CPU makes float32 copies of all keys and values before the loop
        of_k, of_v, of_mask, i = jax.lax.optimization_barrier((k, v, mask, i))
        of_k, of_v = (jax.lax.dynamic_slice_in_dim(part, i * block, block, axis=2) for part in (of_k, of_v))
        of_mask = jax.lax.dynamic_slice_in_dim(of_mask, i * block, block, axis=3)
        return jax.lax.cond(of_mask.any(), lambda: fold(carry, of_k, of_v, of_mask), lambda: carry)

    none = jnp.zeros(rows.shape[:3], jnp.float32)
    carry = jnp.full_like(none, jnp.finfo(jnp.float32).min), none, jnp.zeros(rows.shape, jnp.float32)
    full = k.shape[2] // block
    carry = jax.lax.fori_loop(0, full, step, carry)
    if k.shape[2] % block:
        carry = fold(carry, k[:, :, full * block :], v[:, :, full * block :], mask[..., full * block :])
    _, total, mixed = carry
    return mixed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]


def _scores(
    rows: Float[Array, "batch kv_heads rows d_head"],
    k: Float[Array, "batch kv_heads kv_seq d_head"],
    mask: Bool[Array, "batch 1 rows kv_seq"],
) -> Float32[Array, "batch kv_heads rows kv_seq"]:
    scores = jnp.einsum("bhqd,bhsd->bhqs", rows, k.astype(rows.dtype), preferred_element_type=jnp.float32)
    # a finite floor, not -inf: a pad query sees nothing, and its garbage must stay finite
    return jnp.where(mask, scores * rows.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)


def _weighted(
    weights: Float32[Array, "batch kv_heads rows kv_seq"],
    v: Float[Array, "batch kv_heads kv_seq d_head"],
    dtype: DTypeLike,
) -> Float32[Array, "batch kv_heads rows d_head"]:
    return jnp.einsum("bhqs,bhsd->bhqd", weights.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32)


class Attention(eqx.Module):
    """y = W_o z, z = attend(W_q x, W_k x, W_v x) (arXiv 2305.13245; transformers `Qwen2Attention`, `Qwen3Attention`)."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: RMSNorm | None  # Qwen3: over d_head, before RoPE
    k_norm: RMSNorm | None
    heads: int = eqx.field(static=True)
    kv_heads: int = eqx.field(static=True)
    d_head: int = eqx.field(static=True)

    @classmethod
    def init(cls, config: QwenConfig, *, dtype: DTypeLike, key: PRNGKeyArray) -> "Attention":
        q, k, v, o = jax.random.split(key, 4)
        wide, narrow = config.heads * config.d_head, config.kv_heads * config.d_head

        def norm() -> RMSNorm | None:
            return RMSNorm.init(config.d_head, config.norm_eps, dtype) if config.qk_norm else None

        return cls(
            Linear.init(config.d_model, wide, bias=config.qkv_bias, dtype=dtype, key=q),
            Linear.init(config.d_model, narrow, bias=config.qkv_bias, dtype=dtype, key=k),
            Linear.init(config.d_model, narrow, bias=config.qkv_bias, dtype=dtype, key=v),
            Linear.init(wide, config.d_model, bias=False, dtype=dtype, key=o),
            norm(),
            norm(),
            config.heads,
            config.kv_heads,
            config.d_head,
        )

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        rotation: Rotation,
        seen: Seen,
        past: LayerCache | None = None,
        entry: Int[Array, ""] | int = 0,
        tap: BlockTap = unchanged,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache]:
        """y, and the keys and values attended to: `past` with this chunk at `entry` and after, or the chunk's own.

        `tap` meets q, k and v before norm and RoPE, and z; if it asks for them, the pattern and each head's result.
        """
        (batch, seq, _), dtype = x.shape, x.dtype
        group = self.heads // self.kv_heads
        q = tap("q", rounded(self.q(x), dtype)).reshape(batch, seq, self.kv_heads, group, self.d_head)
        k = tap("k", rounded(self.k(x), dtype)).reshape(batch, seq, self.kv_heads, self.d_head)
        v = tap("v", rounded(self.v(x), dtype)).reshape(batch, seq, self.kv_heads, self.d_head)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        chunk = LayerCache(rotation(k).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
        cache = chunk if past is None else past.write(chunk, entry)
        q = rotation(q)
        keys, values = cache.keys, cache.values
        if seen is None or seen.ndim == 1:
            if asked(tap, "pattern"):
                z = attend(q, keys, values, _below(seq, seen), tap)
            else:
                z = attend_causally(q, keys, values, seen)
        else:
            z = attend(q, keys, values, seen, tap)
        z = tap("z", rounded(z.reshape(batch, seq, self.heads * self.d_head), dtype))
        y = rounded(self.o(z), dtype)
        if asked(tap, "result"):
            each = self.result(z)
            met = tap("result", each)
            if met is not each:  # the difference first: it is exactly zero where nothing was changed
                change = (met - each).astype(jnp.float32).reshape(batch, seq, self.heads, -1).sum(axis=2)
                y = rounded(y.astype(jnp.float32) + change, dtype)
        return y, cache

    def result(self, z: Float[Array, "batch seq width"]) -> Float[Array, "batch seq heads_d_model"]:
        """W_o z of each head alone, heads side by side; their sum is y but for rounding."""
        apart = z.reshape(*z.shape[:2], self.heads, self.d_head)
        weight = self.o.weight.reshape(-1, self.heads, self.d_head)
        each = jnp.einsum("bshd,ohd->bsho", apart, weight, preferred_element_type=jnp.float32)
        return rounded(each.reshape(*z.shape[:2], -1), z.dtype)


def _below(seq: int, pads: Int[Array, " batch"] | None) -> Bool[Array, "_ seq seq"]:
    """Which tokens each sees where all attend to one another: those up to its own, but for the row's first `pads`."""
    causal = jnp.tril(jnp.ones((seq, seq), bool))[None]
    return causal if pads is None else causal & (jnp.arange(seq)[None, None, :] >= pads[:, None, None])
