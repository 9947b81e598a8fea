"""Rotary position embeddings: angles in float32, rotation of half-split pairs as Hugging Face lays them out."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


class Rotation(eqx.Module):
    """cos and sin of each position's angles, made once per forward pass and shared by all layers."""

    cos: Float32[Array, "batch seq half"]
    sin: Float32[Array, "batch seq half"]

    @classmethod
    def at(cls, positions: Int[Array, "batch seq"], d_head: int, theta: float) -> "Rotation":
        """angle[p, i] = p · theta^(-2i / d_head) (arXiv 2104.09864; transformers `Qwen2RotaryEmbedding`)."""
        exponents = np.arange(0, d_head, 2, dtype=np.float32) / np.float32(d_head)
        frequencies = jnp.asarray(np.float32(1) / np.float32(theta) ** exponents)
        # float32, whatever the model's dtype: bf16 rounds position 257 to 256
        angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
        return cls(jnp.cos(angles), jnp.sin(angles))

    def __call__(self, x: Float[Array, "batch seq *heads d_head"]) -> Float[Array, "batch seq *heads d_head"]:
        """(a, b) -> (a cos − b sin, b cos + a sin), a and b the two halves of a head."""
        lead = self.cos.shape[:2] + (1,) * (x.ndim - 3) + self.cos.shape[2:]
        cos, sin = self.cos.reshape(lead), self.sin.reshape(lead)
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
