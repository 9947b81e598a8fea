"""How many bytes a generation takes, known before anything is allocated."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_eqx.model.cache import cache_bytes
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.room import check_room


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the two things that grow with batch and length."""

    cache_bytes: int  # 2 · layers · batch · kv_heads · kv_seq · d_head · bytes per value
    capture_bytes: int  # sites · d_model · bytes per value · (rows · new + prompts · prompt, as positions ask)

    @classmethod
    def of(
        cls,
        config: QwenConfig,
        *,
        batch: int,
        kv_seq: int,
        cache_dtype: DTypeLike,
        sites: int = 0,
        captured_positions: int = 0,
        capture_dtype: DTypeLike = jnp.bfloat16,
    ) -> "MemoryPlan":
        """`captured_positions` is the sum over rows of positions kept per site."""
        return cls(
            cache_bytes(config, batch=batch, kv_seq=kv_seq, dtype=cache_dtype),
            sites * captured_positions * config.d_model * jnp.dtype(capture_dtype).itemsize,
        )

    @property
    def total_bytes(self) -> int:
        return self.cache_bytes + self.capture_bytes

    def __str__(self) -> str:
        return f"KV cache {self.cache_bytes / 1e6:,.1f} MB, captured activations {self.capture_bytes / 1e6:,.1f} MB"

    def check_fits(self, free_bytes: int | None, lower: str = "max_new_tokens or the number of rows") -> None:
        """Raises `InputError` saying what to lower if the plan needs more than `free_bytes` (None: not known)."""
        if self.capture_bytes > self.cache_bytes:
            lower = f"the captured sites or positions, {lower}"
        check_room(str(self), self.total_bytes, free_bytes, lower)
