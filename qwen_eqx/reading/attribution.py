"""Direct logit attribution: each part's own share of a logit, with the final norm's scale held."""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from qwen_eqx.errors import InputError
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.effect import Tokens, captured_padded
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import Activation, Site
from qwen_eqx.reading.labelled import Labelled
from qwen_eqx.text.ids import bucket, check_ids, pad_right

_HIGHEST = jax.lax.Precision.HIGHEST  # the parts sum to the logit on accelerators too


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Shares of the logits of some tokens after every position; all of them together are the logits."""

    embed: Labelled  # [position, target]: of the token's own embedding
    heads: Labelled  # [layer, head, position, target]
    mlps: Labelled  # [layer, position, target]
    rounding: Labelled  # [position, target]: what the stream's type lost on the way; near zero in float32
    logits: Labelled  # [position, target]: the model's

    @property
    def parts(self) -> Labelled:
        """All shares side by side, [part, position, target]; their sum over parts is `logits`."""
        layers, heads = (self.heads.labels[axis] for axis in ("layer", "head"))
        names = (
            "embed",
            *(f"L{layer}H{head}" for layer in layers for head in heads),
            *(f"L{layer} mlp" for layer in layers),
        )
        flat = self.heads.values.reshape(-1, *self.logits.values.shape)
        stacked = np.concatenate([self.embed.values[None], flat, self.mlps.values, self.rounding.values[None]])
        return Labelled(stacked, {"part": (*names, "rounding"), **self.logits.labels})


def logit_attribution(model: Qwen, tokens: Tokens, targets: Sequence[int]) -> Attribution:
    """share(part) = part · (w ⊙ u_target) / scale, for x = embed + Σ heads + Σ mlps, u a row of the head, w the final gain.

    (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".) The share of a difference of two logits is the
    difference of the shares. Biases of values are in their heads' shares.
    """
    config, asked = model.config, _targets(model.config, targets)
    layers = range(config.layers)
    names = ["hook_embed", "ln_final.hook_scale", f"blocks.{config.layers - 1}.hook_resid_post"]
    names += [f"blocks.{layer}.{kind}" for layer in layers for kind in ("attn.hook_z", "hook_mlp_out")]
    shares = _shares(model, captured_padded(model, tokens, names), asked)
    seq = len(tokens)
    last = {"position": tuple(range(seq)), "target": tuple(asked.tolist())}
    by = {"layer": tuple(layers)}
    cut = {name: np.asarray(share)[..., :seq, :] for name, share in shares.items()}
    return Attribution(
        Labelled(cut["embed"], last),
        Labelled(cut["heads"], by | {"head": tuple(range(config.heads))} | last),
        Labelled(cut["mlps"], by | last),
        Labelled(cut["rounding"], last),
        Labelled(cut["logits"], last),
    )


def head_sources(model: Qwen, tokens: Tokens, targets: Sequence[int], *, position: int = -1) -> Labelled:
    """Each head's share of the logits after one position, by the position it read: [layer, head, source, target].

    share(s) = pattern[position, s] · W_o v_s · (w ⊙ u_target) / scale; over sources it sums to the head's share.
    """
    config, asked = model.config, _targets(model.config, targets)
    ids = check_ids(tokens, config.vocab, name="tokens")
    if not -len(ids) <= position < len(ids):
        raise InputError(f"position: found {position}, expected one of {-len(ids)}..{len(ids) - 1}")
    padded = jnp.asarray(pad_right([ids], bucket(len(ids)), 0))
    shares = _source_shares(model, padded, jnp.asarray(position % len(ids), jnp.int32), asked)
    labels = {"layer": tuple(range(config.layers)), "head": tuple(range(config.heads))}
    labels |= {"source": tuple(range(len(ids))), "target": tuple(asked.tolist())}
    return Labelled(np.asarray(shares)[:, :, : len(ids)], labels)


def _targets(config: QwenConfig, targets: Sequence[int]) -> Int[Array, " targets"]:
    ids = check_ids(targets, config.vocab, name="targets")
    if not ids:
        raise InputError("targets: found no token, expected the ids whose logits are asked about")
    return jnp.asarray(ids, jnp.int32)


def _directions(model: Qwen, targets: Int[Array, " targets"]) -> Float32[Array, "targets d_model"]:
    """w ⊙ u of each target: what is read from the stream once it is divided by the scale."""
    table = model.embed.table if model.head is None else model.head.weight
    return table[targets].astype(jnp.float32) * model.norm.weight.astype(jnp.float32)[None]


def _through(
    model: Qwen, layer: int, directions: Float32[Array, "targets d_model"]
) -> Float32[Array, "targets heads _"]:
    """The directions as the heads of a block see them, through the output projection."""
    weight = model.blocks[layer].attn.o.weight.astype(jnp.float32)
    seen = jnp.einsum("to,oi->ti", directions, weight, precision=_HIGHEST)
    return seen.reshape(directions.shape[0], model.config.heads, model.config.d_head)


@eqx.filter_jit
def _shares(
    model: Qwen, acts: dict[str, Float[Array, "rows _"]], targets: Int[Array, " targets"]
) -> dict[str, Float32[Array, "*parts rows targets"]]:
    config, directions = model.config, _directions(model, targets)
    scale = acts["ln_final.hook_scale"]

    def share(part: Float[Array, "rows d_model"]) -> Float32[Array, "rows targets"]:
        return jnp.einsum("sd,td->st", part.astype(jnp.float32), directions, precision=_HIGHEST) / scale

    def of_heads(layer: int) -> Float32[Array, "heads rows targets"]:
        z = acts[f"blocks.{layer}.attn.hook_z"].astype(jnp.float32).reshape(-1, config.heads, config.d_head)
        return jnp.einsum("shd,thd->hst", z, _through(model, layer, directions), precision=_HIGHEST) / scale[None]

    layers = range(config.layers)
    shares = {
        "embed": share(acts["hook_embed"]),
        "heads": jnp.stack([of_heads(layer) for layer in layers]),
        "mlps": jnp.stack([share(acts[f"blocks.{layer}.hook_mlp_out"]) for layer in layers]),
    }
    logits = model.logits(acts[f"blocks.{config.layers - 1}.hook_resid_post"])[:, targets]
    rounding = logits - shares["embed"] - shares["heads"].sum(axis=(0, 1)) - shares["mlps"].sum(axis=0)
    return shares | {"rounding": rounding, "logits": logits}


class _RowOfPatterns:
    """A tap that keeps one query's row of every pattern, all values, and that query's final scale."""

    def __init__(self, config: QwenConfig, position: Int[Array, ""]):
        self.asks = frozenset(Site(layer, "pattern") for layer in range(config.layers))
        self.position = position
        self.kept: dict[Site, Array] = {}

    def __call__(self, site: Site, value: Activation) -> Activation:
        if site.kind == "pattern":
            self.kept[site] = value[0, :, self.position]
        elif site.kind == "v":
            self.kept[site] = value[0]
        elif site.kind == "final_scale":
            self.kept[site] = value[0, self.position]
        return value


@eqx.filter_jit
def _source_shares(
    model: Qwen, tokens: Int[Array, "1 rows"], position: Int[Array, ""], targets: Int[Array, " targets"]
) -> Float32[Array, "layers heads rows targets"]:
    config, tap = model.config, _RowOfPatterns(model.config, position)
    x, _ = model.forward(tokens, jnp.zeros(1, jnp.int32), tap=tap)
    model.normed(x, tap)
    directions = _directions(model, targets)

    def of_block(layer: int) -> Float32[Array, "heads rows targets"]:
        v = tap.kept[Site(layer, "v")].astype(jnp.float32).reshape(-1, config.kv_heads, config.d_head)
        seen = _through(model, layer, directions).reshape(
            targets.shape[0], config.kv_heads, config.group, config.d_head
        )
        each = jnp.einsum("skd,tkgd->kgst", v, seen, precision=_HIGHEST)  # a group of heads reads the same values
        weights = tap.kept[Site(layer, "pattern")][:, :, None]
        return weights * each.reshape(config.heads, *each.shape[2:])

    shares = jnp.stack([of_block(layer) for layer in range(config.layers)])
    return shares / tap.kept[Site(0, "final_scale")][0]
