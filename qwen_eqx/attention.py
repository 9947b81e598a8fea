"""Grouped-query attention: projections, optional q/k norm (Qwen3), RoPE, and the attend function."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from qwen_eqx.config import QwenConfig
from qwen_eqx.layers import Linear, RMSNorm


def attend(
    q: Float[Array, "batch seq kv_heads group d_head"],
    k: Float[Array, "batch kv_heads kv_seq d_head"],
    v: Float[Array, "batch kv_heads kv_seq d_head"],
    mask: Bool[Array, "batch seq kv_seq"],
) -> Float[Array, "batch seq kv_heads group d_head"]:
    """softmax(q kᵀ / sqrt(d_head) + mask) v, scores and softmax in float32 (transformers `eager_attention_forward`)."""
    batch, seq, kv_heads, group, d_head = q.shape
    rows = q.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, seq * group, d_head)  # one product per (row, kv head)
    scores = jnp.einsum("bhqd,bhsd->bhqs", rows, k.astype(q.dtype), preferred_element_type=jnp.float32) * d_head**-0.5
    scores = scores.reshape(batch, kv_heads, seq, group, -1)
    # a finite floor, not -inf: a pad query sees nothing, and its garbage must stay finite
    scores = jnp.where(mask[:, None, :, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(batch, kv_heads, seq * group, -1)
    z = jnp.einsum("bhqs,bhsd->bhqd", weights, v.astype(q.dtype), preferred_element_type=jnp.float32)
    return z.astype(q.dtype).reshape(batch, kv_heads, seq, group, d_head).transpose(0, 2, 1, 3, 4)


class Attention(eqx.Module):
    """Weights of grouped-query attention (arXiv 2305.13245; transformers `Qwen2Attention`, `Qwen3Attention`)."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: RMSNorm | None  # Qwen3: over d_head, before RoPE
    k_norm: RMSNorm | None

    @classmethod
    def init(cls, config: QwenConfig, *, dtype: DTypeLike, key: PRNGKeyArray) -> "Attention":
        q, k, v, o = jax.random.split(key, 4)
        wide, narrow = config.heads * config.d_head, config.kv_heads * config.d_head
        norm = RMSNorm.init(config.d_head, config.norm_eps, dtype) if config.qk_norm else None
        return cls(
            Linear.init(config.d_model, wide, bias=config.qkv_bias, dtype=dtype, key=q),
            Linear.init(config.d_model, narrow, bias=config.qkv_bias, dtype=dtype, key=k),
            Linear.init(config.d_model, narrow, bias=config.qkv_bias, dtype=dtype, key=v),
            Linear.init(wide, config.d_model, bias=False, dtype=dtype, key=o),
            norm,
            norm,
        )
