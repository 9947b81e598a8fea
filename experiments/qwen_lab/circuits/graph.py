"""An attribution graph: nodes, edges, what they were made from; saved without pickle, pruned, scored."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float, Int

from qwen_lab import files
from qwen_lab.circuits import influence
from qwen_lab.circuits.influence import Edges
from qwen_lab.errors import InputError

FEATURE, ERROR, TOKEN, LOGIT = range(4)
KINDS = ("feature", "error", "token", "logit")
ARRAYS, FACTS = "graph.safetensors", "graph.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Features, errors, tokens and logits, in this order; what a kind does not have is 0.

    reading = Σ weights of edges in + left_out + bias: of a feature its value before the nonlinearity, of a logit the
    logit less the mean of all.
    """

    kind: Int[np.ndarray, " nodes"]  # number in KINDS
    layer: Int[np.ndarray, " nodes"]  # −1 for tokens, the number of blocks for logits
    position: Int[np.ndarray, " nodes"]
    index: Int[np.ndarray, " nodes"]  # latent, −1 for errors, token id
    activation: Float[np.ndarray, " nodes"]  # of a feature
    probability: Float[np.ndarray, " nodes"]  # of a logit
    reading: Float[np.ndarray, " nodes"]  # of a feature or logit: what its edges add up to
    bias: Float[np.ndarray, " nodes"]  # the part of it that is constant
    left_out: Float[np.ndarray, " nodes"]  # the part of it that features outside the graph add
    influence: Float[np.ndarray, " nodes"]  # on the logits, by paths of any length
    cumulative: Float[np.ndarray, " nodes"]  # share of all influence of this node and those above it

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, chosen: Bool[np.ndarray, " nodes"] | Int[np.ndarray, " chosen"]) -> "Nodes":
        return Nodes(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    @property
    def ids(self) -> list[str]:
        """Neuronpedia's names: L_f_p, L_-1_p for errors, E_id_p for tokens, {blocks + 1}_id_p for logits."""
        names = zip(self.kind, self.layer, self.index, self.position, strict=True)
        return [
            f"{'E' if kind == TOKEN else layer + 1 if kind == LOGIT else layer}_{index}_{position}"
            for kind, layer, index, position in names
        ]

    def find(self, name: str) -> int:
        """The number of the node of this name."""
        try:
            return self.ids.index(name)
        except ValueError:
            raise InputError(f"node: found {name!r}, expected one of the graph's, such as {self.ids[0]!r}") from None


@dataclasses.dataclass(frozen=True)
class Graph:
    """How one thing leads to another in one pass: which features, errors and tokens make the last position's logits."""

    tokens: list[int]
    pieces: list[str]  # the text of each token
    nodes: Nodes
    edges: Edges
    facts: dict[str, Any]  # model, transcoders, options, scores, active features
    groups: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # label -> names of nodes: supernodes

    def __repr__(self) -> str:
        counts = ", ".join(f"{np.sum(self.nodes.kind == n)} {name}s" for n, name in enumerate(KINDS))
        return f"Graph({len(self.tokens)} tokens, {counts}, {len(self.edges):,} edges)"

    @property
    def first(self) -> Float[np.ndarray, " nodes"]:
        """What influence starts with: the logits' probabilities."""
        return self.nodes.probability.astype(np.float64)

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> "Graph":
        """Nodes that make up this share of the influence, edges that make up this share of what passes between them.

        Tokens and logits stay. Influence and scores remain those of the whole graph.
        """
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not 0 <= share <= 1:
                raise InputError(f"{name}: found {share}, expected a share from 0 to 1")
        kind = self.nodes.kind
        kept = influence.prune(
            self.edges, self.first, self.nodes.layer, always=kind >= TOKEN, fed=kind == FEATURE,
            node_share=nodes, edge_share=edges,
        )  # fmt: skip
        return self._part(kept.nodes, kept.edges, {"node_threshold": nodes, "edge_threshold": edges})

    def _part(
        self, nodes: Bool[np.ndarray, " nodes"], edges: Bool[np.ndarray, " edges"], facts: dict[str, Any]
    ) -> "Graph":
        number = np.cumsum(nodes, dtype=np.int64).astype(np.int32) - 1
        left = self.edges[edges]
        gone = self.edges[~edges]
        lost = np.bincount(gone.target, gone.weight, minlength=len(self.nodes)).astype(np.float32)
        inside = dataclasses.replace(self.nodes, left_out=self.nodes.left_out + lost)[nodes]
        return dataclasses.replace(
            self,
            nodes=inside,
            edges=Edges(number[left.source], number[left.target], left.weight),
            facts=self.facts | facts,
        )

    def save(self, directory: str | Path) -> None:
        """graph.safetensors with the arrays, graph.json with all else."""
        directory = files.fresh_directory(Path(directory))
        parts = {"nodes": self.nodes, "edges": self.edges}
        arrays = {
            f"{name}.{field.name}": np.ascontiguousarray(getattr(part, field.name))
            for name, part in parts.items()
            for field in dataclasses.fields(part)
        }
        files.write_bytes(directory / ARRAYS, safetensors.numpy.save(arrays))
        told = {
            "version": VERSION,
            "tokens": self.tokens,
            "pieces": self.pieces,
            "facts": self.facts,
            "groups": self.groups,
        }
        files.write_json(directory / FACTS, told)

    @classmethod
    def load(cls, directory: str | Path) -> "Graph":
        """What `save` wrote."""
        path = Path(directory) / FACTS
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            arrays = safetensors.numpy.load((Path(directory) / ARRAYS).read_bytes())
            if told["version"] != VERSION:
                raise InputError(f"{path}: version: found {told['version']}, expected {VERSION}")

            def part(name: str, cls: type) -> dict[str, np.ndarray]:
                return {field.name: arrays[f"{name}.{field.name}"] for field in dataclasses.fields(cls)}

            nodes, edges = Nodes(**part("nodes", Nodes)), Edges(**part("edges", Edges))
            return cls(told["tokens"], told["pieces"], nodes, edges, told["facts"], told["groups"])
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{directory}: found no graph ({type(error).__name__}: {error}), expected what Graph.save wrote"
            ) from None
