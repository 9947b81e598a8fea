"""An attribution graph: nodes, edges, what they were made from; saved without pickle, pruned, scored."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float

from qwen_lab import files
from qwen_lab.circuits import influence, neuronpedia, page
from qwen_lab.circuits.influence import Edges
from qwen_lab.circuits.nodes import FEATURE, KINDS, LOGIT, TOKEN, Features, Nodes
from qwen_lab.errors import InputError
from sae import shown

ARRAYS, FACTS = "graph.safetensors", "graph.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Graph:
    """How one thing leads to another in one pass: which features, errors and tokens make the last position's logits."""

    tokens: list[int]
    pieces: list[str]  # the text of each token
    nodes: Nodes
    edges: Edges
    fired: Features  # all that fire, traced or not
    facts: dict[str, Any]  # model, transcoders, options, scores
    groups: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # label -> names of nodes: supernodes
    grids: list[page.Grid] = dataclasses.field(default_factory=list)  # what a page draws below the graph

    def __repr__(self) -> str:
        counts = ", ".join(f"{np.sum(self.nodes.kind == n)} {name}s" for n, name in enumerate(KINDS))
        return f"Graph({len(self.tokens)} tokens, {counts}, {len(self.edges):,} edges)"

    def _repr_html_(self) -> str:
        """What it says of the answer, and which features lead there most."""
        nodes = self.nodes
        facts = {"is": repr(self)} | {name: self.facts[name] for name in page.FACTS if self.facts.get(name) is not None}
        for n in np.flatnonzero(nodes.kind == LOGIT)[:4].tolist():
            token = self.facts.get("logit_tokens", {}).get(str(nodes.index[n]), str(nodes.index[n]))
            facts[f"says {token!r}"] = f"with probability {nodes.probability[n]:.3f}"
        features = np.flatnonzero(nodes.kind == FEATURE)
        for n in features[np.argsort(-nodes.influence[features], kind="stable")][:8].tolist():
            at = int(nodes.position[n])
            where = repr(self.pieces[at]) if at < len(self.pieces) else "?"
            facts[f"layer {nodes.layer[n]}, latent {nodes.index[n]}"] = (
                f"influence {nodes.influence[n]:.3g}, at {at} {where}"
            )
        return shown.as_html("Graph", facts)

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

    def described(self, slug: str) -> dict[str, Any]:
        """The graph as Neuronpedia's JSON, schema version 1."""
        links = zip(self.edges.source.tolist(), self.edges.target.tolist(), self.edges.weight.tolist(), strict=True)
        return neuronpedia.described(self.nodes, links, self.pieces, self.facts | {"slug": slug}, self.groups)

    def neuronpedia(self, path: str | Path, slug: str | None = None) -> None:
        """Writes the JSON that Neuronpedia and circuit-tracer's frontend open; prune first."""
        files.write_json(Path(path), self.described(slug or Path(path).stem))

    def page(self, path: str | Path, title: str = "What leads to what the model says") -> None:
        """Writes one HTML file that needs no server; prune first, or it is large."""
        tokens = np.flatnonzero(self.nodes.kind == TOKEN)
        reach = dict(zip(self.nodes.position[tokens].tolist(), self.nodes.influence[tokens].tolist(), strict=True))
        facts = self.facts | {"reach": reach}
        text = page.render(title, self.described(Path(path).stem), self.fired, facts, self.grids)
        files.write_bytes(Path(path), text.encode("utf-8", "backslashreplace"))

    def save(self, directory: str | Path) -> None:
        """graph.safetensors with the arrays, graph.json with all else."""
        directory = files.fresh_directory(Path(directory))
        parts = {"nodes": self.nodes, "edges": self.edges, "fired": self.fired}
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
            "grids": self.grids,
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

            parts = Nodes(**part("nodes", Nodes)), Edges(**part("edges", Edges)), Features(**part("fired", Features))
            return cls(told["tokens"], told["pieces"], *parts, *(told[name] for name in ("facts", "groups", "grids")))
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{directory}: found no graph ({type(error).__name__}: {error}), expected what Graph.save wrote"
            ) from None
