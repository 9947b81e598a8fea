"""LoRA: a product of two thin matrices beside a frozen one, and back into it (Hu et al. 2021, arXiv 2106.09685)."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from qwen_eqx.errors import InputError, positive
from qwen_eqx.model.layers import Linear, matmul
from qwen_eqx.model.qwen import Block, Qwen

TARGETS: dict[str, Callable[[Block], Any]] = {
    "q": lambda block: block.attn.q,
    "k": lambda block: block.attn.k,
    "v": lambda block: block.attn.v,
    "o": lambda block: block.attn.o,
    "gate": lambda block: block.mlp.gate,
    "up": lambda block: block.mlp.up,
    "down": lambda block: block.mlp.down,
}


class LoRA(eqx.Module):
    """y = W x + b + (α / rank) B A x; B starts at 0, so that nothing changes at first (section 4.1)."""

    linear: Linear  # frozen
    a: Float[Array, "rank d_in"]
    b: Float[Array, "d_out rank"]
    scale: float = eqx.field(static=True)  # α / rank

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float32[Array, "*batch d_out"]:
        thin = matmul(x, self.a.astype(x.dtype)).astype(x.dtype)
        return self.linear(x) + self.scale * matmul(thin, self.b.astype(x.dtype))

    def merge(self) -> Linear:
        """W + (α / rank) B A as a plain matrix, in W's dtype."""
        weight = self.linear.weight
        change = self.scale * (self.b.astype(jnp.float32) @ self.a.astype(jnp.float32))
        return Linear((weight.astype(jnp.float32) + change).astype(weight.dtype), self.linear.bias)

    @staticmethod
    def wrap(
        model: Qwen,
        *,
        rank: int,
        alpha: float | None = None,
        targets: Sequence[str] = ("q", "k", "v", "o", "gate", "up", "down"),
        key: PRNGKeyArray | None = None,
    ) -> Qwen:
        """The model with a LoRA beside each target matrix of each block; `alpha` is `rank` unless said."""
        positive("rank", rank)
        if unknown := [name for name in targets if name not in TARGETS]:
            raise InputError(f"targets: found {unknown[0]!r}, expected some of {', '.join(TARGETS)}")
        places = [(index, name) for index in range(len(model.blocks)) for name in targets]
        keys = jax.random.split(jax.random.key(0) if key is None else key, max(1, len(places)))
        scale = (rank if alpha is None else alpha) / rank
        linears = [TARGETS[name](model.blocks[index]) for index, name in places]
        if any(isinstance(linear, LoRA) for linear in linears):
            raise InputError("model: found one that holds LoRA already, expected it merged: `training.merge(model)`")
        wrapped = [_beside(linear, rank, scale, key) for linear, key in zip(linears, keys, strict=False)]
        return eqx.tree_at(lambda m: [TARGETS[name](m.blocks[index]) for index, name in places], model, wrapped)


def _beside(linear: Linear, rank: int, scale: float, key: PRNGKeyArray) -> LoRA:
    d_out, d_in = linear.weight.shape
    a = jax.random.normal(key, (rank, d_in), jnp.float32) * d_in**-0.5
    return LoRA(linear, a, jnp.zeros((d_out, rank), jnp.float32), scale)


def merge(model: Qwen) -> Qwen:
    """The model with every LoRA merged into its matrix: a plain model again, ready to be saved."""
    return jax.tree.map(lambda part: part.merge() if is_lora(part) else part, model, is_leaf=is_lora)


def trainable(model: Qwen) -> Any:
    """Which leaves training moves, as a tree of booleans: A and B where there is a LoRA, else every floating array."""
    parts = jax.tree.leaves(model, is_leaf=is_lora)
    if not any(map(is_lora, parts)):
        return jax.tree.map(eqx.is_inexact_array, model)

    def of_part(part: Any) -> Any:
        nothing = jax.tree.map(lambda _: False, part)
        return eqx.tree_at(lambda lora: (lora.a, lora.b), nothing, (True, True)) if is_lora(part) else nothing

    return jax.tree.map(of_part, model, is_leaf=is_lora)


def is_lora(part: Any) -> bool:
    return isinstance(part, LoRA)
