"""What is left of a pass when attention patterns and norm scales are held: a linear map, and its transpose by hand.

With the patterns P, the scales s = 1/rms and the MLPs' outputs m of one pass held, the residual stream is affine in what
is written into it: x_mid = x + Σ_heads W_o P W_v (s · gain · x) + W_o b_v, x' = x_mid + m (attribution graphs:
transformer-circuits.pub/2025/attribution-graphs/methods.html).
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from qwen_eqx.model.attention import Attention
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.rope import Rotation
from qwen_eqx.model.sites import Site

Stream = Float[Array, "targets seq d_model"]
Read = Callable[[Int[Array, ""], Stream], PyTree]


class Mixing(eqx.Module):
    """The attention of one block as a linear map of the residual stream, or of all blocks stacked."""

    pattern: Float[Array, "*layers kv_heads group seq kv_seq"]
    value: Float[Array, "*layers kv_heads d_head d_model"]  # the norm's gain is in it
    output: Float[Array, "*layers kv_heads group d_head d_model"]
    bias: Float[Array, "*layers d_model"]  # W_o b_v: a pattern's row sums to 1
    scale: Float[Array, "*layers seq"]  # of the norm before it

    def __call__(self, x: Stream) -> Stream:
        """Without the bias."""
        v = jnp.einsum("tsm,khm->tskh", x * self.scale[None, :, None], self.value)
        z = jnp.einsum("kgqs,tskh->tqkgh", self.pattern, v)
        return jnp.einsum("tqkgh,kghm->tqm", z, self.output)

    def transposed(self, g: Stream) -> Stream:
        """g ↦ s · W_vᵀ Pᵀ W_oᵀ g; the heads that share keys and values are summed in the product with Pᵀ."""
        z = jnp.einsum("tqm,kghm->tqkgh", g, self.output)
        v = jnp.einsum("kgqs,tqkgh->tskh", self.pattern, z)
        return jnp.einsum("tskh,khm->tsm", v, self.value) * self.scale[None, :, None]


class Skip(eqx.Module):
    """What goes past an MLP's features: (x · scale) W, of one block or of all stacked."""

    weight: Float[Array, "*layers d_model d_out"]
    scale: Float[Array, "*layers seq"]

    def __call__(self, x: Stream) -> Stream:
        return jnp.einsum("tsm,mo->tso", x * self.scale[None, :, None], self.weight)

    def transposed(self, g: Stream) -> Stream:
        return jnp.einsum("tso,mo->tsm", g, self.weight) * self.scale[None, :, None]


class Targets(eqx.Module):
    """Linear readings of the residual stream: vector · x_mid of a block at a position, or of what leaves the last block.

    `layer` is the block, or the number of blocks for the stream after the last one; −1 reads nothing.
    """

    layer: Int[Array, " targets"]
    position: Int[Array, " targets"]
    vector: Float[Array, "targets d_model"]

    def entering(self, number: Int[Array, ""] | int, g: Stream) -> Stream:
        """g with the vectors of the targets that read there."""
        here = jnp.where((self.layer == number)[:, None], self.vector, jnp.zeros_like(self.vector))
        return g.at[jnp.arange(g.shape[0]), self.position].add(here)


class Frozen(eqx.Module):
    """The affine map from what is written, token embeddings and MLP outputs, to what blocks and the head read."""

    mixing: Mixing
    mlp_scale: Float[Array, "layers seq"]
    mlp_gain: Float[Array, "layers d_model"]
    norm_scale: Float[Array, " seq"]  # of the norm before the head
    norm_gain: Float[Array, " d_model"]
    skip: Skip | None = None

    @property
    def layers(self) -> int:
        return self.mlp_scale.shape[0]

    def with_skip(self, weight: Float[Array, "layers d_model d_model"], normed: bool) -> "Frozen":
        """MLPs that also write x W, of x_mid or of what their norm makes of it: a path that is not held."""
        scale = self.mlp_scale if normed else jnp.ones_like(self.mlp_scale)
        weight = weight * self.mlp_gain[:, :, None] if normed else weight
        return eqx.tree_at(lambda m: m.skip, self, Skip(weight, scale), is_leaf=lambda leaf: leaf is None)

    def __call__(
        self, embed: Float[Array, "seq d_model"], written: Float[Array, "layers seq d_model"]
    ) -> tuple[Float[Array, "layers seq d_model"], Float[Array, "seq d_model"]]:
        """x_mid of every block, and the stream after the last, from what tokens and MLPs write."""

        def through(x: Array, parts: tuple[Mixing, Skip | None, Array]) -> tuple[Array, Array]:
            mixing, skip, out = parts
            mid = x + mixing(x) + mixing.bias[None, None]
            passed = mid if skip is None else mid + skip(mid)
            return passed + out[None], mid[0]

        last, mids = jax.lax.scan(through, embed[None], (self.mixing, self.skip, written))
        return mids, last[0]

    def pull(self, targets: Targets, read: Read) -> tuple[PyTree, Stream, Float[Array, " targets"]]:
        """Down from the targets: `read(block, g)` of every block's MLP output, stacked; g of the embeddings; the constant.

        g [targets, seq, d_model] is by how much each target grows with what is written there, so that
        target = Σ g · written + Σ g · embed + constant, the constant being the value biases'. One scan over the blocks, no
        tape: of g there is one copy whatever the depth, and blocks above all targets cost nothing.
        """
        top, count = jnp.max(targets.layer), self.layers
        seq, d_model = self.norm_scale.shape[0], targets.vector.shape[1]
        none = jnp.zeros((targets.layer.shape[0], seq, d_model), targets.vector.dtype)
        empty = jax.eval_shape(read, jax.ShapeDtypeStruct((), jnp.int32), none)

        def down(carry: tuple[Stream, Array], parts: tuple[Array, Mixing, Skip | None]) -> Any:
            number, mixing, skip = parts
            g, constant = carry
            said = read(number, g)
            g = targets.entering(number, g if skip is None else g + skip.transposed(g))
            constant = constant + jnp.einsum("tsm,m->t", g, mixing.bias)
            return (g + mixing.transposed(g), constant), said

        def step(carry: tuple[Stream, Array], parts: tuple[Array, Mixing, Skip | None]) -> Any:
            above = lambda: (carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty))  # noqa: E731
            return jax.lax.cond(parts[0] <= top, lambda: down(carry, parts), above)

        begin = targets.entering(count, none), jnp.zeros(none.shape[:1], none.dtype)
        numbers = jnp.arange(count, dtype=jnp.int32)
        (g, constant), said = jax.lax.scan(step, begin, (numbers, self.mixing, self.skip), reverse=True)
        return said, g, constant


class Passed(eqx.Module):
    """What stood in the residual stream in the pass that was frozen, in float32."""

    embed: Float[Array, "seq d_model"]
    mid: Float[Array, "layers seq d_model"]
    mlp_out: Float[Array, "layers seq d_model"]
    last: Float[Array, "seq d_model"]
    logits: Float[Array, " vocab"]  # of the last position


def freeze(model: Qwen, tokens: Sequence[int] | Int[Array, " seq"]) -> tuple[Frozen, Passed]:
    """The map that is left of this model's pass over these tokens, and the pass."""
    blocks = range(model.config.layers)
    kinds = ("resid_pre", "q", "k", "resid_mid", "mlp_out", "resid_post")
    logits, acts = model.run_with_capture(
        tokens, [Site(layer, kind) for layer in blocks for kind in kinds], logits="last"
    )
    stacked = {kind: [acts[Site(layer, kind)] for layer in blocks] for kind in kinds}
    assert logits is not None
    return _frozen(model, stacked, logits)


@eqx.filter_jit
def _frozen(model: Qwen, acts: dict[str, list[Array]], logits: Float[Array, " vocab"]) -> tuple[Frozen, Passed]:
    seq, config = acts["resid_pre"][0].shape[0], model.config
    rotation = Rotation.at(jnp.arange(seq, dtype=jnp.int32)[None], config.d_head, config.rope_theta)

    def wide(parts: list[Array]) -> Array:
        return jnp.stack([part.astype(jnp.float32) for part in parts])  # effects are sums of many small terms

    def scale(x: Array) -> Array:
        return jax.lax.rsqrt(jnp.mean(x**2, axis=-1) + config.norm_eps)

    pre, mid, last = wide(acts["resid_pre"]), wide(acts["resid_mid"]), acts["resid_post"][-1].astype(jnp.float32)
    of_blocks = zip(model.blocks, scale(pre), acts["q"], acts["k"], strict=True)
    mixing = [_mixing(block.attn, block.attn_norm.weight, s, rotation, q, k) for block, s, q, k in of_blocks]
    frozen = Frozen(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *mixing),
        scale(mid),
        wide([block.mlp_norm.weight for block in model.blocks]),
        scale(last),
        model.norm.weight.astype(jnp.float32),
    )
    return frozen, Passed(pre[0], mid, wide(acts["mlp_out"]), last, logits)


def _mixing(
    attn: Attention,
    gain: Float[Array, " d_model"],
    scale: Float[Array, " seq"],
    rotation: Rotation,
    q: Float[Array, "seq width"],
    k: Float[Array, "seq narrow"],
) -> Mixing:
    group, d_head = attn.heads // attn.kv_heads, attn.d_head
    q, k = q.reshape(1, -1, attn.kv_heads, group, d_head), k.reshape(1, -1, attn.kv_heads, d_head)
    if attn.q_norm is not None and attn.k_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    scores = jnp.einsum("qkgh,skh->kgqs", rotation(q)[0], rotation(k)[0], preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones(scores.shape[2:], bool))
    pattern = jax.nn.softmax(jnp.where(causal[None, None], scores * d_head**-0.5, -jnp.inf), axis=-1)
    value = attn.v.weight.astype(jnp.float32) * gain.astype(jnp.float32)[None]
    output = attn.o.weight.astype(jnp.float32).T.reshape(attn.kv_heads, group, d_head, -1)
    bias = jnp.zeros(output.shape[-1], jnp.float32)
    if attn.v.bias is not None:
        held = attn.v.bias.astype(jnp.float32).reshape(attn.kv_heads, d_head)
        bias = jnp.einsum("kh,kghm->m", held, output)
    return Mixing(pattern, value.reshape(attn.kv_heads, d_head, -1), output, bias, scale)
