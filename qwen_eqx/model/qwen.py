"""The decoder: embed, blocks, final norm, head. One forward pass serves plain calls, prefill and decoding."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from qwen_eqx.errors import InputError
from qwen_eqx.model.attention import Attention, Seen
from qwen_eqx.model.cache import KVCache, LayerCache, visible
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.edits import AbstractEdit, EditTap, check_positions, resolve_edits
from qwen_eqx.model.layers import Embedding, Linear, RMSNorm, SwiGLU, matmul, rounded
from qwen_eqx.model.room import check_room, free_device_bytes
from qwen_eqx.model.rope import Rotation
from qwen_eqx.model.rows import Prompts, Rows
from qwen_eqx.model.sites import Activation, Recorder, Site, Tap, untouched


@dataclasses.dataclass(frozen=True)
class At:
    """The tap of one block, or of the parts that no block holds: names the layer, rounds what the tap changes."""

    layer: int
    tap: Tap

    def __call__(self, kind: str, value: Activation) -> Activation:
        met = self.tap(Site(self.layer, kind), value)
        return value if met is value else rounded(met, value.dtype)

    @property
    def asks(self) -> frozenset[str]:
        """The kinds that the tap wants here."""
        return frozenset(site.kind for site in getattr(self.tap, "asks", ()) if site.layer == self.layer)


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
        seen: Seen,
        past: LayerCache | None,
        entry: Int[Array, ""] | int,
        tap: Tap,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache]:
        """The new residual stream, and the keys and values attended to: `past` with this chunk at `entry`, or its own."""
        dtype, at = x.dtype, At(self.layer, tap)
        x = at("resid_pre", rounded(x, dtype))
        mixed, cache = self.attn(self.attn_norm(x, at, "ln1"), rotation, seen, past, entry, at)
        x = at("resid_mid", rounded(x + at("attn_out", mixed), dtype))
        normed = at("mlp_in", rounded(self.mlp_norm(x, at, "ln2"), dtype))
        x = at("resid_post", rounded(x + at("mlp_out", self.mlp(normed, at)), dtype))
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

    def __repr__(self) -> str:
        c = self.config
        sizes = f"layers={c.layers}, d_model={c.d_model}, heads={c.heads}/{c.kv_heads}, d_ff={c.d_ff}, vocab={c.vocab}"
        dtype = getattr(self.embed.table, "dtype", "no arrays")  # a tree of anything may have this shape
        return f"Qwen({c.model_type}, {sizes}, max_seq={c.max_seq}, {dtype}, {c.parameters:,} parameters)"

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
        seen = jnp.maximum(-length, 0) if past is None else visible(positions, index, kv_seq)
        x = At(0, tap)("embed", self.embed(tokens))
        layers = []
        for block in self.blocks:
            layer = None if past is None else past.layers[block.layer]
            x, layer = block(x, rotation, seen, layer, index % kv_seq, tap)
            layers.append(layer)
        return x, KVCache(tuple(layers), index + seq, length + seq)

    def read(
        self, tokens: Int[Array, "batch seq"], *, remat: bool = False, tap: Tap = untouched
    ) -> Float[Array, "batch seq d_model"]:
        """The residual stream after the last block, of whole documents from position 0: `forward`, to be differentiated.

        Its attention keeps no scores for the gradient. `remat`: of each block only what goes in is kept, the rest is
        computed again (`jax.checkpoint`); a tap that keeps what it sees wants none.
        """
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        rotation = Rotation.at(positions, self.config.d_head, self.config.rope_theta)

        def through(block: Block, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
            return block(x, rotation, None, None, 0, tap)[0]

        x = At(0, tap)("embed", self.embed(tokens))
        for block in self.blocks:
            x = eqx.filter_checkpoint(through)(block, x) if remat else through(block, x)
        return x

    def logits(self, x: Float[Array, "*batch d_model"], tap: Tap = untouched) -> Float32[Array, "*batch vocab"]:
        """head(norm(x)), in float32; `tap` meets the final norm."""
        return self.unembed(self.normed(x, tap))

    def normed(self, x: Float[Array, "*batch d_model"], tap: Tap = untouched) -> Float[Array, "*batch d_model"]:
        """The final norm alone, which `tap` meets."""
        return self.norm(x, At(0, tap), "final")

    def unembed(self, normed: Float[Array, "*batch d_model"]) -> Float32[Array, "*batch vocab"]:
        """The head alone, tied or not."""
        return matmul(normed, self.embed.table if self.head is None else self.head.weight)

    def __call__(self, tokens: Int[Array, " seq"]) -> Float32[Array, "seq vocab"]:
        """Logits after every token; `jax.vmap` for a batch."""
        x, _ = self.forward(tokens[None], jnp.zeros(1, jnp.int32))
        return self.logits(x[0])

    def run_with_capture(
        self,
        prompts: Prompts,
        sites: Iterable[str | Site],
        *,
        edits: Sequence[AbstractEdit] = (),
        logits: str | None = "all",
    ) -> tuple[Float32[Array, "*shape"] | None, dict[Any, Float[Array, "*batch seq width"]]]:
        """Logits and the activations at `sites` (after `edits`, if any), keyed as asked; all kinds, both spellings.

        `prompts` is one sequence of ids: logits [seq, vocab], activations [seq, width]. Or a batch, a list of sequences or
        a matrix: [batch, seq, vocab] and [batch, seq, width], zeros right of each row's end. A pattern is [heads, seq, seq]
        and [batch, heads, seq, seq], a row for each query. `logits` is "all", or "last"
        for those of each row's last position alone, [batch, vocab], or None. Compiled once per bucket of lengths, batch
        size, sites and kinds of edits; inside another `jit`, `vmap` or `grad` it is part of that.
        """
        if logits not in ("all", "last", None):
            raise InputError(f"logits: found {logits!r}, expected 'all', 'last' or None")
        names = {name: Site.parse(name, self.config) for name in sites}
        rows = Rows.of(prompts, self.config)
        resolved = resolve_edits(edits, self.config, rows=len(rows.lengths))
        check_positions(resolved, rows.lengths)
        wanted = tuple(dict.fromkeys(names.values()))
        if not isinstance(rows.tokens, Tracer):  # a shape that is only asked about takes no memory
            _check_room(self.config, rows, wanted, logits, self.dtype.itemsize)
        table, values = _captured(self, resolved, rows.tokens, jnp.asarray(rows.lengths), wanted, logits)
        if table is not None:
            table = rows.cut(table) if logits == "all" else table[0] if rows.single else table
        acts = {site: rows.cut(value, square=site.kind == "pattern") for site, value in values.items()}
        return table, {name: acts[site] for name, site in names.items()}


def _check_room(config: QwenConfig, rows: Rows, sites: tuple[Site, ...], logits: str | None, itemsize: int) -> None:
    batch, width = rows.tokens.shape
    logit_bytes = 4 * batch * config.vocab * {"all": width, "last": 1, None: 0}[logits]
    values = sum(site.width(config) * (width if site.kind == "pattern" else 1) for site in sites)
    act_bytes = batch * width * itemsize * values
    what = f"logits, {logit_bytes / 1e6:,.1f} MB, and activations, {act_bytes / 1e6:,.1f} MB,"
    lower = "the number of rows, tokens or sites" + (", or ask for logits='last'" if logits == "all" else "")
    check_room(what, logit_bytes + act_bytes, free_device_bytes(), lower)


@eqx.filter_jit
def _captured(
    model: Qwen,
    edits: tuple[AbstractEdit, ...],
    tokens: Int[Array | np.ndarray, "batch width"],
    lengths: Int[Array, " batch"],
    sites: tuple[Site, ...],
    logits: str | None,
) -> tuple[Float32[Array, "batch *seq vocab"] | None, dict[Site, Float[Array, "batch *shape"]]]:
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (batch, width))
    recorder = Recorder(sites, EditTap(edits, positions, lengths, model.config))
    x, _ = model.forward(jnp.asarray(tokens), jnp.zeros(batch, jnp.int32), tap=recorder)
    normed, table = model.normed(x, recorder), None  # of all positions, whatever is asked of logits: a tap may want it
    if logits == "all":
        table = model.unembed(normed)
    elif logits == "last":
        table = model.unembed(normed[jnp.arange(batch), lengths - 1])
    real = positions < lengths[:, None]

    def kept(value: Float[Array, "batch ..."], axis: int = 1) -> Float[Array, "batch ..."]:
        # the pads of a single row are cut off anyway
        where = real.reshape(batch, *(width if place == axis else 1 for place in range(1, value.ndim)))
        return value if batch == 1 else jnp.where(where, value, jnp.zeros((), value.dtype))

    if table is not None and table.ndim == 3:
        table = kept(table)
    return table, {site: kept(recorder.values[site], 2 if site.kind == "pattern" else 1) for site in sites}
