"""Small models that many tests share, so that each shape is compiled once."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

import qwen_eqx
from qwen_eqx import Qwen, QwenConfig
from qwen_eqx.weights.hf import skeleton

CONFIGS = {
    "qwen2": QwenConfig("qwen2", 97, 16, 2, 4, 2, 6, 24, 64, rope_theta=10_000.0, tied=False),
    "qwen3": QwenConfig("qwen3", 53, 12, 2, 3, 1, 8, 20, 64, rope_theta=10_000.0, tied=True),
}


def random_model(config: QwenConfig, seed: int = 0, dtype: str = "float32") -> Qwen:
    """Every weight random and far from its initial value: norms and biases too; activations stay of order one."""
    rng = np.random.default_rng(seed)

    def weight(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape)
        values = 1 + 0.3 * values if leaf.ndim == 1 else values * 1.5 / np.sqrt(leaf.shape[-1])
        return jnp.asarray(values.astype(leaf.dtype))

    return jax.tree.map(weight, skeleton(config, jnp.dtype(dtype)))


@cache
def model(name: str = "qwen2", dtype: str = "float32") -> Qwen:
    return random_model(CONFIGS[name], dtype=dtype)


def d_model_sites(config: QwenConfig) -> list[str]:
    """Every site that generate can capture."""
    return [
        str(qwen_eqx.Site(layer, kind)) for layer in range(config.layers) for kind in qwen_eqx.model.sites.D_MODEL_KINDS
    ]
