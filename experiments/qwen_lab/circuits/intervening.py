"""Nodes held at values: what the logits become with all else frozen, which the edges add up to, and in the model itself."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import qwen_eqx
import sae
from qwen_eqx.model.frozen import freeze
from qwen_eqx.model.sites import Site
from qwen_lab.circuits.graph import Graph
from qwen_lab.circuits.nodes import FEATURE
from qwen_lab.circuits.replacement import reads_norm, skipping
from qwen_lab.errors import InputError


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Logits of the last position, of all tokens."""

    plain: Float[np.ndarray, " vocab"]
    frozen: Float[
        np.ndarray, " vocab"
    ]  # patterns, norm scales, MLPs and other features held: the edges to logits, summed
    free: Float[np.ndarray, " vocab"]  # the model goes on from there as it will

    @property
    def answers(self) -> tuple[int, int, int]:
        """The most likely token of each."""
        return int(self.plain.argmax()), int(self.frozen.argmax()), int(self.free.argmax())


@dataclasses.dataclass(frozen=True)
class Held:
    """One feature held at a value."""

    layer: int
    position: int
    latent: int
    value: float


def intervene(model: qwen_eqx.Qwen, transcoders: sae.Transcoders, graph: Graph, values: Mapping[str, float]) -> Outcome:
    """Holds features, by node's name or the label of a group, at values; 0 silences.

    A feature writes (value − its activation) times its decoder rows more than it did. Frozen, its activation is that of
    the graph's pass; free, it is what the changed stream makes of it, as in circuit-tracer's unconstrained interventions.
    """
    held = [_feature(graph, name, value) for key, value in values.items() for name in graph.groups.get(key, [key])]
    if len({(each.layer, each.position, each.latent) for each in held}) != len(held):
        raise InputError(f"values: found {', '.join(values)}, expected each feature once")
    frozen, passed = freeze(model, graph.tokens)
    change = np.zeros(passed.mlp_out.shape, np.float32)
    for each in held:
        fired = graph.fired
        same = (fired.layer == each.layer) & (fired.position == each.position) & (fired.latent == each.latent)
        before = float(fired.value[same].sum())
        rows = np.asarray(transcoders.decoder_rows(each.layer, np.asarray([each.latent]))[0])
        change[each.layer : each.layer + len(rows), each.position] += (each.value - before) * rows
    if (skips := skipping(transcoders)) is not None:
        frozen = frozen.with_skip(skips, reads_norm(transcoders))
    _, still = frozen(jnp.zeros_like(passed.embed), jnp.zeros_like(passed.mlp_out))
    _, moved = frozen(jnp.zeros_like(passed.embed), jnp.asarray(change))
    more = _unembedded(model, (moved - still)[-1] * frozen.norm_scale[-1] * frozen.norm_gain)
    plain = np.asarray(passed.logits)
    return Outcome(plain, plain + np.asarray(more), np.asarray(_free(model, transcoders, graph.tokens, held)))


def _feature(graph: Graph, name: str, value: float) -> Held:
    nodes, at = graph.nodes, graph.nodes.find(name)
    if nodes.kind[at] != FEATURE:
        raise InputError(f"node: found {name!r}, expected a feature: others are not held")
    return Held(int(nodes.layer[at]), int(nodes.position[at]), int(nodes.index[at]), value)


def _unembedded(model: qwen_eqx.Qwen, normed: Float[Array, " d_model"]) -> Float[Array, " vocab"]:
    table = model.embed.table if model.head is None else model.head.weight
    return table.astype(jnp.float32) @ normed


def _free(
    model: qwen_eqx.Qwen, transcoders: sae.Transcoders, tokens: list[int], held: list[Held]
) -> Float[Array, " vocab"]:
    normed, mids, later = reads_norm(transcoders), {}, {}

    def tap(site: Site, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        if site.kind == "resid_mid":
            mids[site.layer] = x
        if site.kind != "mlp_out":
            return x
        here = [each for each in held if each.layer == site.layer]
        if here:
            mid = mids[site.layer]
            read = model.blocks[site.layer].mlp_norm(mid) if normed else mid
            z = transcoders.encode(site.layer, read[0])
            latents = np.asarray([each.latent for each in here])
            rows = transcoders.decoder_rows(site.layer, latents)
            for number, each in enumerate(here):
                by = each.value - z[each.position, each.latent]
                for down in range(rows.shape[1]):
                    later.setdefault(site.layer + down, []).append((each.position, by * rows[number, down]))
        change = jnp.zeros(x.shape, jnp.float32)
        for position, row in later.get(site.layer, []):
            change = change.at[0, position].add(row)
        return (x.astype(jnp.float32) + change).astype(x.dtype)

    # not compiled: an encoder may be too large to be a constant, and which features are held changes each time
    x, _ = model.forward(jnp.asarray([tokens]), jnp.zeros(1, jnp.int32), tap=tap)
    return model.logits(x[0, -1])
