"""Influence over sparse edges: how much of what reaches the logits passes a node or an edge, and what may be pruned.

Definitions are circuit-tracer's (safety-research/circuit-tracer, `graph.py`): an edge's share is |weight| over the sum of
the |weights| that enter its target, and a node's influence is what flows back to it from the logits along shares, logits
starting with their probabilities. All sums are float64, and over edges: no matrix of nodes by nodes is made.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Edges:
    """Direct linear effects: the source adds `weight` to what the target reads; sorted by target."""

    source: Int[np.ndarray, " edges"]
    target: Int[np.ndarray, " edges"]
    weight: Float[np.ndarray, " edges"]

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, chosen: Bool[np.ndarray, " edges"] | Int[np.ndarray, " chosen"]) -> "Edges":
        return Edges(self.source[chosen], self.target[chosen], self.weight[chosen])

    @classmethod
    def joined(cls, parts: list["Edges"]) -> "Edges":
        every = cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))
        return every[np.lexsort((every.source, every.target))]

    def shares(self, nodes: int) -> Float[np.ndarray, " edges"]:
        """|weight| over the sum of the |weights| into the same target."""
        size = np.abs(self.weight.astype(np.float64))
        return size / np.maximum(np.bincount(self.target, size, minlength=nodes), 1e-30)[self.target]


@dataclasses.dataclass(frozen=True)
class Block:
    """Edges into some targets, as rows over the sources that any of them has: 4 bytes where an edge alone takes 12."""

    source: Int[np.ndarray, " sources"]
    target: Int[np.ndarray, " targets"]
    weight: Float[np.ndarray, "targets sources"]

    @classmethod
    def of_rows(cls, targets: Int[np.ndarray, " targets"], rows: Float[np.ndarray, "targets sources"]) -> "Block":
        """Of dense rows, without the columns that are zero."""
        used = np.flatnonzero(rows.any(axis=0))
        return cls(used.astype(np.int32), targets.astype(np.int32), rows.take(used, axis=1))

    def edges(self) -> Edges:
        """What is not zero."""
        row, column = np.nonzero(self.weight)
        return Edges(self.source[column], self.target[row], self.weight[row, column])


def flow(
    edges: Edges,
    shares: Float[np.ndarray, " edges"],
    first: Float[np.ndarray, " nodes"],
    depth: Int[np.ndarray, " nodes"],
) -> Float[np.ndarray, " nodes"]:
    """What arrives at each node, what it starts with included: from deep targets to shallow, each edge met once.

    An edge's source is less deep than its target, so nothing needs repeating until it settles.
    """
    total = first.astype(np.float64)
    for chosen in _by_depth(depth[edges.target]):
        passed = shares[chosen] * total[edges.target[chosen]]
        total += np.bincount(edges.source[chosen], passed, minlength=len(total))
    return total


def _by_depth(depth: Int[np.ndarray, " edges"]) -> Iterator[Int[np.ndarray, " chosen"]]:
    order = np.argsort(-depth, kind="stable")
    ends = np.flatnonzero(np.diff(depth[order])) + 1
    yield from np.split(order, ends)


def at_least(scores: Float[np.ndarray, " scores"], share: float) -> Bool[np.ndarray, " scores"]:
    """The largest scores that make up this share of their sum, ties with the last of them included."""
    if not scores.sum() > 0:
        return np.zeros(scores.shape, bool)
    ranked = np.sort(scores)[::-1]
    place = int(np.searchsorted(np.cumsum(ranked) / ranked.sum(), share))
    return scores >= max(ranked[min(place, len(ranked) - 1)], np.finfo(np.float64).tiny)


def cumulative(scores: Float[np.ndarray, " nodes"]) -> Float[np.ndarray, " nodes"]:
    """The share of the sum that a node and all larger ones make up: kept by a threshold no lower than this."""
    order = np.argsort(-scores, kind="stable")
    share = np.empty(len(scores))
    share[order] = np.cumsum(scores[order]) / max(scores.sum(), 1e-30)
    return share


@dataclasses.dataclass(frozen=True)
class Kept:
    """What pruning leaves."""

    nodes: Bool[np.ndarray, " nodes"]
    edges: Bool[np.ndarray, " edges"]


def prune(
    edges: Edges,
    first: Float[np.ndarray, " nodes"],
    depth: Int[np.ndarray, " nodes"],
    *,
    always: Bool[np.ndarray, " nodes"],  # tokens and logits
    fed: Bool[np.ndarray, " nodes"],  # features: without an edge in they explain nothing
    node_share: float,
    edge_share: float,
) -> Kept:
    """Nodes by their influence, then edges by share times their target's, then whatever hangs loose, until nothing does."""
    nodes = len(first)
    influence = flow(edges, edges.shares(nodes), first, depth) - first
    kept = at_least(influence, node_share) | always
    inside = np.flatnonzero(kept[edges.source] & kept[edges.target])
    left = edges[inside]
    shares = left.shares(nodes)
    scores = shares * flow(left, shares, first, depth)[left.target]
    alive = at_least(scores, edge_share)
    while True:
        sends = np.bincount(left.source[alive], minlength=nodes) > 0
        gets = np.bincount(left.target[alive], minlength=nodes) > 0
        loose = kept & ~always & ~(sends & (gets | ~fed))
        if not loose.any():
            break
        kept &= ~loose
        alive &= kept[left.source] & kept[left.target]
    mask = np.zeros(len(edges), bool)
    mask[inside[alive]] = True
    return Kept(kept, mask)


def scores(
    edges: Edges,
    first: Float[np.ndarray, " nodes"],
    depth: Int[np.ndarray, " nodes"],
    errors: Bool[np.ndarray, " nodes"],
    tokens: Bool[np.ndarray, " nodes"],
) -> tuple[float, float]:
    """(replacement, completeness), both better the closer to 1.

    Replacement: of the influence that ends in tokens or errors, the share of tokens. Completeness: the share of a node's
    input that does not come from errors, in the mean over nodes weighted by influence.
    """
    nodes = len(first)
    shares = edges.shares(nodes)
    output = flow(edges, shares, first, depth)
    to_tokens, to_errors = output[tokens].sum(), output[errors].sum()
    of_errors = errors[edges.source]
    missed = np.bincount(edges.target[of_errors], shares[of_errors], minlength=nodes)
    replacement = to_tokens / max(to_tokens + to_errors, 1e-30)
    return float(replacement), float(((1 - missed) * output).sum() / max(output.sum(), 1e-30))
