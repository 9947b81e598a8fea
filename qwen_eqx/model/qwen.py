"""The decoder: embed, blocks, final norm, head. One forward pass serves plain calls, prefill and decoding."""

from collections.abc import Iterable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from qwen_eqx.model.attention import Attention
from qwen_eqx.model.cache import KVCache, LayerCache, visible
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.edits import AbstractEdit, EditTap, resolve_edits
from qwen_eqx.model.layers import Embedding, Linear, RMSNorm, SwiGLU, matmul, rounded
from qwen_eqx.model.rope import Rotation
from qwen_eqx.model.sites import Recorder, Site, Tap, untouched


class Block(eqx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)) (transformers `Qwen2DecoderLayer`)."""

    attn_norm: RMSNorm
    attn: Attention
    mlp_norm: RMSNorm
    mlp: SwiGLU
    layer: int = eqx.field(static=True)

    @classmethod
    def init(cls, config: QwenConfig, layer: int, *, dtype: DTypeLike, key: PRNGKeyArray) -> "Block":
        attn, mlp = jax.random.split(key)
        return cls(
            RMSNorm.init(config.d_model, config.norm_eps, dtype),
            Attention.init(config, dtype=dtype, key=attn),
            RMSNorm.init(config.d_model, config.norm_eps, dtype),
            SwiGLU.init(config.d_model, config.d_ff, dtype=dtype, key=mlp),
            layer,
        )

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        rotation: Rotation,
        mask: Bool[Array, "batch seq kv_seq"],
        past: LayerCache | None,
        entry: Int[Array, ""],
        tap: Tap,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache]:
        """The new residual stream, and the keys and values attended to: `past` with this chunk at `entry`, or its own."""
        dtype = x.dtype

        def at(kind: str, value: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
            return rounded(tap(Site(self.layer, kind), value), dtype)

        x = at("resid_pre", rounded(x, dtype))
        mixed, cache = self.attn(self.attn_norm(x), rotation, mask, past, entry, at)
        x = at("resid_mid", rounded(x + at("attn_out", mixed), dtype))
        x = at("resid_post", rounded(x + at("mlp_out", self.mlp(self.mlp_norm(x), at)), dtype))
        return x, cache


class Qwen(eqx.Module):
    """A Qwen2, Qwen2.5 or dense Qwen3 decoder (transformers `Qwen2ForCausalLM`, `Qwen3ForCausalLM`)."""

    embed: Embedding
    blocks: tuple[Block, ...]  # a tuple, not stacked arrays: a scan over a stack copies every layer's weights each step
    norm: RMSNorm
    head: Linear | None  # None: tied to the embedding table
    config: QwenConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: QwenConfig, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.bfloat16) -> "Qwen":
        """Random weights; under `eqx.filter_eval_shape` a skeleton of any size in no memory."""
        embed, head, *blocks = jax.random.split(key, config.layers + 2)
        return cls(
            Embedding.init(config.vocab, config.d_model, dtype=dtype, key=embed),
            tuple(Block.init(config, layer, dtype=dtype, key=block) for layer, block in enumerate(blocks)),
            RMSNorm.init(config.d_model, config.norm_eps, dtype),
            None if config.tied else Linear.init(config.d_model, config.vocab, bias=False, dtype=dtype, key=head),
            config,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights, residual stream and, unless asked otherwise, cache."""
        return self.embed.table.dtype

    def forward(
        self,
        tokens: Int[Array, "batch seq"],
        length: Int[Array, " batch"],
        past: KVCache | None = None,
        tap: Tap = untouched,
    ) -> tuple[Float[Array, "batch seq d_model"], KVCache]:
        """The residual stream after the last block, and the cache.

        `length` is the position of each row's first token (negative: that many left pads). Without a past the tokens attend
        to one another and the cache holds just these; with a past, `length` must be the past's.
        """
        seq = tokens.shape[1]
        index = jnp.zeros((), jnp.int32) if past is None else past.index
        kv_seq = seq if past is None else past.kv_seq
        positions = length[:, None] + jnp.arange(seq, dtype=jnp.int32)[None, :]
        rotation = Rotation.at(positions, self.config.d_head, self.config.rope_theta)
        mask = visible(positions, 0 if past is None else index, kv_seq)
        x = self.embed(tokens)
        layers = []
        for block in self.blocks:
            layer = None if past is None else past.layers[block.layer]
            x, layer = block(x, rotation, mask, layer, index % kv_seq, tap)
            layers.append(layer)
        return x, KVCache(tuple(layers), index + seq, length + seq)

    def logits(self, x: Float[Array, "*batch d_model"]) -> Float32[Array, "*batch vocab"]:
        """head(norm(x)), in float32."""
        weight = self.embed.table if self.head is None else self.head.weight
        return matmul(self.norm(x), weight)

    def __call__(self, tokens: Int[Array, " seq"]) -> Float32[Array, "seq vocab"]:
        """Logits after every token; `jax.vmap` for a batch."""
        x, _ = self.forward(tokens[None], jnp.zeros(1, jnp.int32))
        return self.logits(x[0])

    def run_with_capture(
        self, tokens: Int[Array, " seq"], sites: Iterable[str], *, edits: Sequence[AbstractEdit] = ()
    ) -> tuple[Float32[Array, "seq vocab"], dict[str, Float[Array, "seq width"]]]:
        """Logits and the activations at `sites` (after `edits`, if any), keyed as asked; all kinds, both spellings."""
        names = {name: Site.parse(name, self.config) for name in sites}
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
        edit = EditTap(resolve_edits(edits, self.config), positions, jnp.full(1, tokens.shape[0], jnp.int32))
        recorder = Recorder(names.values(), edit)
        x, _ = self.forward(tokens[None], jnp.zeros(1, jnp.int32), tap=recorder)
        return self.logits(x[0]), {name: recorder.values[site][0] for name, site in names.items()}
