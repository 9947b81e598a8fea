"""From a prompt to its attribution graph: logits first, then the features that matter most, a batch of rows at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import qwen_eqx
import sae
from qwen_lab.circuits import influence, nodes
from qwen_lab.circuits.graph import Graph
from qwen_lab.circuits.influence import Block, Edges
from qwen_lab.circuits.nodes import Nodes
from qwen_lab.circuits.replacement import Replacement, replace
from qwen_lab.circuits.rows import batches, direct_effects
from qwen_lab.errors import InputError


@dataclasses.dataclass(frozen=True)
class Options:
    """How far a graph goes; all that the graph is follows from these but for `batch`."""

    logits: int = 10  # at most
    probability: float = 0.95  # of the logits together, unless they are too many
    max_features: int | None = 4096  # whose inputs are traced; None: all that have influence
    queue: int = 256  # features between two rankings by influence
    first: int = 1  # earlier positions have neither features nor errors: their MLPs are sinks, no dictionary's business
    batch: int = 64  # targets of one sweep: memory grows with it, and nothing else does

    def __post_init__(self) -> None:
        least = {"logits": 1, "queue": 1, "first": 0, "batch": 1} | (
            {} if self.max_features is None else {"max_features": 0}
        )
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name}: found {getattr(self, name)}, expected at least {bound}")
        if not 0 < self.probability <= 1:
            raise InputError(f"probability: found {self.probability}, expected more than 0 and at most 1")


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Logits:
    """The tokens that are explained, most likely first."""

    ids: Int[np.ndarray, " logits"]
    probability: Float[np.ndarray, " logits"]
    centred: Float[np.ndarray, " logits"]  # less the mean of all logits
    vector: Float[Array, "logits d_model"]  # reads them from the stream after the last block

    @classmethod
    def of(cls, model: qwen_eqx.Qwen, replacement: Replacement, options: Options) -> "Logits":
        logits = replacement.passed.logits
        likely = np.asarray(jax.nn.softmax(logits))
        ranked = np.argsort(-likely, kind="stable")[: options.logits]
        enough = int(np.searchsorted(np.cumsum(likely[ranked]), options.probability)) + 1
        ids = ranked[:enough]
        table = (model.embed.table if model.head is None else model.head.weight).astype(jnp.float32)
        frozen = replacement.frozen
        vector = (table[ids] - jnp.mean(table, axis=0)[None]) * (frozen.norm_gain * frozen.norm_scale[-1])[None]
        return cls(ids, likely[ids], np.asarray(logits - jnp.mean(logits))[ids], vector)

    def __len__(self) -> int:
        return len(self.ids)


class Tracer:
    """Rows of the adjacency as they are found, and the influence that they give so far."""

    def __init__(self, transcoders: sae.Transcoders, replacement: Replacement, logits: Logits, options: Options):
        self.transcoders, self.replacement, self.options = transcoders, replacement, options
        self.logits = logits
        self.levels: dict[int, list[Block]] = {level: [] for level in range(replacement.layers, -1, -1)}  # of targets
        count = replacement.constant + len(logits)  # logits are numbered behind the sources
        self.bias = np.zeros(count, np.float32)
        self.size = np.zeros(count)  # Σ |weights| into each target
        self.depth = np.full(count, -1)
        self.depth[: len(replacement.features)] = replacement.features.layer
        self.depth[replacement.constant :] = replacement.layers
        self.first = np.zeros(count)
        self.first[replacement.constant :] = logits.probability

    def add_logits(self) -> None:
        r, n = self.replacement, len(self.logits)
        where = np.full(n, r.layers), np.full(n, r.seq - 1)
        self._add(r.constant + np.arange(n), *where, self.logits.vector)

    def add_features(self, chosen: Int[np.ndarray, " chosen"]) -> None:
        fired = self.replacement.features
        layer, position, latent = (array[chosen] for array in (fired.layer, fired.position, fired.latent))
        rows = np.zeros((len(chosen), self.transcoders.d_model), np.float32)
        biases = np.zeros(len(chosen), np.float32)
        for each in np.unique(layer):
            here = np.flatnonzero(layer == each)
            weight, bias = self.transcoders.encoder_rows(int(each), latent[here])
            rows[here], biases[here] = np.asarray(weight), np.asarray(bias)
        self.bias[chosen] = biases
        self._add(chosen, layer, position, self.replacement.reading(position, layer, jnp.asarray(rows)))

    def _add(self, number: np.ndarray, layer: np.ndarray, position: np.ndarray, vector: Array) -> None:
        batch = self.options.batch
        for at in batches(layer, position, batch, self.replacement.seq):
            rows = direct_effects(self.replacement, layer[at], position[at], vector[at], batch)
            self.bias[number[at]] += rows[:, -1]
            self.size[number[at]] = np.abs(rows[:, :-1]).sum(axis=1, dtype=np.float64)
            for level in np.unique(layer[at]):
                here = layer[at] == level
                self.levels[int(level)].append(Block.of_rows(number[at][here], rows[here, :-1]))

    @property
    def parts(self) -> Iterator[Edges]:
        """All edges that are known, some targets' at a time."""
        return (block.edges() for known in self.levels.values() for block in known)

    def influence(self) -> Float[np.ndarray, " sources"]:
        """Of every node, by the rows that are known: as `influence.flow`, without joining them."""
        total = self.first.copy()
        for known in self.levels.values():
            passed = total / np.maximum(self.size, 1e-30)  # complete for the targets of this level, which comes next
            for block in known:
                for target, weight in zip(block.target, block.weight, strict=True):  # in float64 one row at a time
                    total[block.source] += np.abs(weight) * passed[target]
        return total


def trace(
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    transcoders: sae.Transcoders,
    text_or_ids: str | Sequence[int],
    options: Options = DEFAULTS,
    advance: Callable[[int], None] = lambda rows: None,
) -> Graph:
    """Which features, errors and tokens lead to what the model says after this text, and by how much each to each.

    Attention patterns, norm scales and MLP outputs are those of this one pass. `advance` is told of rows as they are
    found. A float32 model gives exact sums; a bf16 one rounds its stream where the graph does not.
    """
    tokens = tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else [int(token) for token in text_or_ids]
    replacement = replace(model, transcoders, tokens, options.first)
    logits = Logits.of(model, replacement, options)
    tracer = Tracer(transcoders, replacement, logits, options)
    tracer.add_logits()
    advance(len(logits))
    fired = len(replacement.features)
    most = fired if options.max_features is None else min(options.max_features, fired)
    visited = np.zeros(fired, bool)
    while visited.sum() < most:
        matters = np.where(visited, 0.0, tracer.influence()[:fired])
        ranked = np.argsort(-matters, kind="stable")[: min(options.queue, most - int(visited.sum()))]
        chosen = np.sort(ranked[matters[ranked] > 0])
        if not len(chosen):
            break  # what is left moves no logit
        tracer.add_features(chosen)
        visited[chosen] = True
        advance(len(chosen))
    pieces = [tokenizer.decode([token]) for token in tokens]
    said = {str(number): tokenizer.decode([int(number)]) for number in logits.ids}
    facts = {
        "logit_tokens": said,
        "active_features": fired,
        "traced_features": int(visited.sum()),
    } | dataclasses.asdict(options)
    return assemble(tracer, np.flatnonzero(visited), pieces, facts)


def assemble(tracer: Tracer, chosen: Int[np.ndarray, " chosen"], pieces: list[str], facts: dict[str, Any]) -> Graph:
    """The graph of the chosen features with all errors, tokens and logits; what other features add is summed."""
    r = tracer.replacement
    kept = np.concatenate([chosen, np.arange(r.errors_from, len(tracer.depth))])
    number = np.full(len(tracer.depth), -1, np.int32)
    number[kept] = np.arange(len(kept))
    inner, left_out, sums = [], np.zeros(len(kept)), np.zeros(len(kept))
    for part in tracer.parts:
        source, target = number[part.source], number[part.target]
        sums += np.bincount(target, part.weight, minlength=len(kept))
        outside = source < 0
        left_out += np.bincount(target[outside], part.weight[outside], minlength=len(kept))
        inner.append(Edges(source[~outside], target[~outside], part.weight[~outside]))
    edges = Edges.joined(inner)
    bias = tracer.bias[kept]
    made = _nodes(tracer, chosen, bias, (sums + bias).astype(np.float32), left_out.astype(np.float32))
    first = made.probability.astype(np.float64)
    reached = influence.flow(edges, edges.shares(len(made)), first, made.layer) - first
    made = dataclasses.replace(
        made,
        influence=reached.astype(np.float32),
        cumulative=influence.cumulative(reached).astype(np.float32),
    )
    errors, words = made.kind == nodes.ERROR, made.kind == nodes.TOKEN
    replaced, complete = influence.scores(edges, first, made.layer, errors, words)
    scores = {"replacement_score": replaced, "completeness_score": complete}
    return Graph(r.tokens, pieces, made, edges, r.features, facts | scores)


def _nodes(
    tracer: Tracer,
    chosen: Int[np.ndarray, " chosen"],
    bias: Float[np.ndarray, " nodes"],
    reading: Float[np.ndarray, " nodes"],
    left_out: Float[np.ndarray, " nodes"],
) -> Nodes:
    r, logits = tracer.replacement, tracer.logits
    fired, seq, places = r.features, r.seq, np.arange(r.seq)
    sizes = len(chosen), r.layers * seq, seq, len(logits)
    none = np.zeros(len(bias), np.float32)

    def joined(*parts: np.ndarray | int) -> np.ndarray:
        return np.concatenate([np.broadcast_to(part, (size,)) for part, size in zip(parts, sizes, strict=True)])

    return Nodes(
        kind=joined(nodes.FEATURE, nodes.ERROR, nodes.TOKEN, nodes.LOGIT).astype(np.int8),
        layer=joined(fired.layer[chosen], np.repeat(np.arange(r.layers), seq), -1, r.layers).astype(np.int32),
        position=joined(fired.position[chosen], np.tile(places, r.layers), places, seq - 1).astype(np.int32),
        index=joined(fired.latent[chosen], -1, np.asarray(r.tokens), logits.ids).astype(np.int32),
        activation=joined(fired.value[chosen], 0, 0, 0).astype(np.float32),
        probability=joined(0, 0, 0, logits.probability).astype(np.float32),
        reading=reading,
        bias=bias,
        left_out=left_out,
        influence=none,
        cumulative=none,
    )
