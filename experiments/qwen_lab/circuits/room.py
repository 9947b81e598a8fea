"""The memory that tracing takes, known from shapes before anything runs."""

import dataclasses

from qwen_eqx import QwenConfig


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes in float32; beside them stand the model's weights and 4 bytes for each source of each row."""

    frozen: int  # patterns, scales, and weights of attention
    sources: int  # what is written, of features, errors and tokens
    sweep: int  # of one batch of targets: g twice, heads' outputs twice, effects

    @property
    def total(self) -> int:
        return self.frozen + self.sources + self.sweep

    @classmethod
    def of(cls, config: QwenConfig, seq: int, rows: int, batch: int) -> "Room":
        """`rows` of each layer: the features that fire there, and two for every position."""
        layers, heads, kv_heads, d_model = config.layers, config.heads, config.kv_heads, config.d_model
        a_layer = heads * seq**2 + (heads + kv_heads) * config.d_head * d_model + 2 * seq + 2 * d_model
        sweep = batch * (seq * (2 * d_model + 2 * heads * config.d_head) + layers * rows + seq)
        return cls(
            frozen=4 * (layers * a_layer + seq + d_model),
            sources=4 * (layers * rows * d_model + seq * d_model),
            sweep=4 * sweep,
        )
