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

from qwen_eqx.model.qwen import Block, Qwen
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

    def before(self, end: int) -> "Mixing":
        """Of the positions before `end`, which later ones never reach."""
        pattern, scale = self.pattern[..., :end, :end], self.scale[..., :end]
        return eqx.tree_at(lambda m: (m.pattern, m.scale), self, (pattern, scale))


class Skip(eqx.Module):
    """What goes past an MLP's features: (x · scale) W, of one block or of all stacked."""

    weight: Float[Array, "*layers d_model d_out"]
    scale: Float[Array, "*layers seq"]

    def __call__(self, x: Stream) -> Stream:
        return jnp.einsum("tsm,mo->tso", x * self.scale[None, :, None], self.weight)

    def transposed(self, g: Stream) -> Stream:
        return jnp.einsum("tso,mo->tsm", g, self.weight) * self.scale[None, :, None]

    def before(self, end: int) -> "Skip":
        """Of the positions before `end`."""
        return Skip(self.weight, self.scale[..., :end])


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

    def pull(
        self, targets: Targets, read: Read, end: int | None = None
    ) -> tuple[PyTree, Stream, Float[Array, " targets"]]:
        """Down from the targets: `read(block, g)` of every block's MLP output, stacked; g of the embeddings; the constant.

        g [targets, seq, d_model] is by how much each target grows with what is written there, so that
        target = Σ g · written + Σ g · embed + constant, the constant being the value biases'. One loop over the blocks, no
        tape: of g there is one copy whatever the depth, and blocks above all targets cost nothing. With all targets before
        position `end`, seq may be `end`: g of later positions would be zero.
        """
        count, seq, d_model = self.layers, end or self.norm_scale.shape[0], targets.vector.shape[1]
        none = jnp.zeros((targets.layer.shape[0], seq, d_model), targets.vector.dtype)
        begin = jnp.minimum(jnp.max(targets.layer), count - 1)

        def down(step: Int[Array, ""], carry: tuple[PyTree, Stream, Array]) -> tuple[PyTree, Stream, Array]:
            said, g, constant = carry
            number = begin - step
            mixing, skip = jax.tree.map(lambda leaf: _at(leaf, number), (self.mixing, self.skip))
            mixing, skip = mixing.before(seq), skip if skip is None else skip.before(seq)
            said = jax.tree.map(lambda every, one: every.at[number].set(one), said, read(number, g))
            g = targets.entering(number, g if skip is None else g + skip.transposed(g))
            constant = constant + jnp.einsum("tsm,m->t", g, mixing.bias)
            return said, g + mixing.transposed(g), constant

        empty = jax.eval_shape(read, jax.ShapeDtypeStruct((), jnp.int32), none)
        said = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), empty)
        constant = jnp.zeros(none.shape[:1], none.dtype)
        # a loop and no scan: deeper blocks are left out, and g is changed in place
        return jax.lax.fori_loop(0, begin + 1, down, (said, targets.entering(count, none), constant))


def _at(stacked: Array, number: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(stacked, number, keepdims=False)


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
    inner, outer = ("ln1_scale", "pattern", "resid_mid", "ln2_scale", "mlp_out"), ("embed", "final_scale")
    sites = [Site(layer, kind) for kind in inner for layer in blocks] + [Site(0, kind) for kind in outer]
    last = Site(blocks[-1], "resid_post")
    logits, acts = model.run_with_capture(tokens, [*sites, last], logits="last")
    assert logits is not None
    stacked = {kind: [acts[Site(layer, kind)] for layer in blocks] for kind in inner}
    return _frozen(model, stacked | {kind: acts[Site(0, kind)] for kind in outer}, acts[last], logits)


@eqx.filter_jit
def _frozen(
    model: Qwen, acts: dict[str, Any], last: Float[Array, "seq d_model"], logits: Float[Array, " vocab"]
) -> tuple[Frozen, Passed]:
    # float32 whatever the model's dtype: effects are sums of many small terms
    whole = {kind: jnp.stack(parts) if isinstance(parts, list) else parts for kind, parts in acts.items()}
    wide = {kind: value.astype(jnp.float32) for kind, value in whole.items()}
    over = {kind: 1 / wide[kind][..., 0] for kind in ("ln1_scale", "ln2_scale", "final_scale")}
    of_blocks = zip(model.blocks, wide["pattern"], over["ln1_scale"], strict=True)
    mixing = [_mixing(block, pattern, scale) for block, pattern, scale in of_blocks]
    frozen = Frozen(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *mixing),
        over["ln2_scale"],
        jnp.stack([block.mlp_norm.weight.astype(jnp.float32) for block in model.blocks]),
        over["final_scale"],
        model.norm.weight.astype(jnp.float32),
    )
    return frozen, Passed(wide["embed"], wide["resid_mid"], wide["mlp_out"], last.astype(jnp.float32), logits)


def _mixing(block: Block, pattern: Float[Array, "heads seq kv_seq"], scale: Float[Array, " seq"]) -> Mixing:
    attn = block.attn
    value, output, gain = (part.astype(jnp.float32) for part in (attn.v.weight, attn.o.weight, block.attn_norm.weight))
    output = output.T.reshape(attn.kv_heads, -1, attn.d_head, output.shape[0])
    bias = jnp.zeros(output.shape[-1], jnp.float32)
    if attn.v.bias is not None:
        held = attn.v.bias.astype(jnp.float32).reshape(attn.kv_heads, attn.d_head)
        bias = jnp.einsum("kh,kghm->m", held, output)
    return Mixing(
        pattern.reshape(attn.kv_heads, -1, *pattern.shape[1:]),
        (value * gain[None]).reshape(attn.kv_heads, attn.d_head, -1),
        output,
        bias,
        scale,
    )
