"""Nodes held at values: what the logits become with all else frozen, which the edges add up to, and in the model itself."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import qwen_eqx
import sae
from qwen_eqx.model.frozen import Frozen, Passed, freeze
from qwen_eqx.model.sites import Site
from qwen_lab.circuits.graph import Graph
from qwen_lab.circuits.nodes import ERROR, FEATURE, LOGIT, TOKEN, Features
from qwen_lab.circuits.replacement import reads, reads_norm, skipping
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
    """One node held at a value."""

    kind: int
    layer: int
    position: int
    index: int
    value: float


def intervene(model: qwen_eqx.Qwen, transcoders: sae.Transcoders, graph: Graph, values: Mapping[str, float]) -> Outcome:
    """Holds features, errors and tokens, by node's name or the label of a group, at values; 0 silences.

    A feature's value is its activation: it writes (value − activation) times its decoder rows more than it did. An error's
    or a token's is a factor, 1 as it was: (value − 1) times the error or the embedding is added. Frozen, an activation is
    that of the graph's pass; free, it is what the changed stream makes of it, as in circuit-tracer's unconstrained
    interventions, and an error stays the vector that it was.
    """
    held = [_held(graph, name, value) for key, value in values.items() for name in graph.groups.get(key, [key])]
    if len({dataclasses.replace(each, value=0.0) for each in held}) != len(held):
        raise InputError(f"values: found {', '.join(values)}, expected each node once")
    frozen, passed = freeze(model, graph.tokens)
    embed = np.zeros(passed.embed.shape, np.float32)
    change = np.zeros(passed.mlp_out.shape, np.float32)
    for each in held:
        if each.kind == TOKEN:
            embed[each.position] = (each.value - 1) * np.asarray(passed.embed[each.position])
        elif each.kind == ERROR:
            change[each.layer, each.position] += (each.value - 1) * _error(transcoders, graph, frozen, passed, each)
    by_errors = change.copy()
    for each in (each for each in held if each.kind == FEATURE):
        rows = np.asarray(transcoders.decoder_rows(each.layer, np.asarray([each.index]))[0])
        before = float(graph.fired.value[_same(graph.fired, each)].sum())
        change[each.layer : each.layer + len(rows), each.position] += (each.value - before) * rows
    if (skips := skipping(transcoders)) is not None:
        frozen = frozen.with_skip(skips, reads_norm(transcoders))
    _, still = frozen(jnp.zeros_like(passed.embed), jnp.zeros_like(passed.mlp_out))
    _, moved = frozen(jnp.asarray(embed), jnp.asarray(change))
    more = _unembedded(model, (moved - still)[-1] * frozen.norm_scale[-1] * frozen.norm_gain)
    plain = np.asarray(passed.logits)
    free = Free(model, transcoders, held, embed, by_errors)(graph.tokens)
    return Outcome(plain, plain + np.asarray(more), np.asarray(free))


def _held(graph: Graph, name: str, value: float) -> Held:
    nodes, at = graph.nodes, graph.nodes.find(name)
    if nodes.kind[at] == LOGIT:
        raise InputError(
            f"node: found {name!r}, a logit, expected a feature, an error or a token: logits are what changes"
        )
    kind, layer, position, index = (int(part[at]) for part in (nodes.kind, nodes.layer, nodes.position, nodes.index))
    return Held(kind, layer, position, index, value)


def _same(fired: Features, held: Held) -> Bool[np.ndarray, " features"]:
    return (fired.layer == held.layer) & (fired.position == held.position) & (fired.latent == held.index)


def _error(
    transcoders: sae.Transcoders, graph: Graph, frozen: Frozen, passed: Passed, held: Held
) -> Float[np.ndarray, " d_model"]:
    """What this MLP wrote at this position and the transcoder did not; nothing where the MLP is not replaced."""
    layer, position, fired = held.layer, held.position, graph.fired
    if position < graph.facts["first"]:
        return np.zeros(transcoders.d_model, np.float32)
    made = np.asarray(transcoders.bias(layer))
    for origin in range(0 if transcoders.crosses else layer, layer + 1):
        here = (fired.layer == origin) & (fired.position == position)
        made = made + fired.value[here] @ np.asarray(
            transcoders.decoder_rows(origin, fired.latent[here])[:, layer - origin]
        )
    if (skip := transcoders.skip(layer)) is not None:
        made = made + np.asarray(reads(frozen, passed, reads_norm(transcoders))[layer, position] @ skip)
    return np.asarray(passed.mlp_out[layer, position]) - made


def _unembedded(model: qwen_eqx.Qwen, normed: Float[Array, " d_model"]) -> Float[Array, " vocab"]:
    table = model.embed.table if model.head is None else model.head.weight
    return table.astype(jnp.float32) @ normed


@dataclasses.dataclass(frozen=True)
class Free:
    """A pass in which nodes are held and all else goes on as it will."""

    model: qwen_eqx.Qwen
    transcoders: sae.Transcoders
    held: list[Held]
    embed: Float[np.ndarray, "seq d_model"]  # added to the tokens' embeddings
    written: Float[np.ndarray, "layers seq d_model"]  # added to what MLPs write, beside what held features do

    def __call__(self, tokens: list[int]) -> Float[Array, " vocab"]:
        mids: dict[int, Array] = {}
        later: dict[int, list[tuple[int, Array]]] = {}

        def tap(site: Site, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
            if site.kind == "embed":
                return _more(x, jnp.asarray(self.embed))
            if site.kind == "resid_mid":
                mids[site.layer] = x
            if site.kind != "mlp_out":
                return x
            for layer, position, row in self._features(site.layer, mids[site.layer]):
                later.setdefault(layer, []).append((position, row))
            change = jnp.asarray(self.written[site.layer])
            for position, row in later.get(site.layer, []):
                change = change.at[position].add(row)
            return _more(x, change)

        # not compiled: an encoder may be too large to be a constant, and which nodes are held changes each time
        x, _ = self.model.forward(jnp.asarray([tokens]), jnp.zeros(1, jnp.int32), tap=tap)
        return self.model.logits(x[0, -1])

    def _features(self, layer: int, mid: Float[Array, "1 seq d_model"]) -> Iterator[tuple[int, int, Array]]:
        """(layer, position, row): what held features of a layer write more than they would, there and in later layers."""
        here = [each for each in self.held if each.kind == FEATURE and each.layer == layer]
        if not here:
            return
        read = self.model.blocks[layer].mlp_norm(mid) if reads_norm(self.transcoders) else mid
        z = self.transcoders.encode(layer, read[0])
        rows = self.transcoders.decoder_rows(layer, np.asarray([each.index for each in here]))
        for each, written in zip(here, rows, strict=True):
            by = each.value - z[each.position, each.index]
            yield from ((layer + down, each.position, by * row) for down, row in enumerate(written))


def _more(x: Float[Array, "1 seq width"], change: Float[Array, "seq width"]) -> Float[Array, "1 seq width"]:
    """The sum in float32, in the stream's own precision."""
    return (x.astype(jnp.float32) + change[None]).astype(x.dtype)
