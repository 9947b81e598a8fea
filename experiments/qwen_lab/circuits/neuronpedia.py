"""A graph as Neuronpedia's JSON, schema version 1 (circuit-tracer, `frontend/graph_models.py`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_lab.circuits.nodes import ERROR, FEATURE, LOGIT, TOKEN, Nodes

TYPES = {FEATURE: "cross layer transcoder", ERROR: "mlp reconstruction error", TOKEN: "embedding", LOGIT: "logit"}


def cantor(x: int, y: int) -> int:
    """One number for two: (x + y)(x + y + 1) / 2 + y."""
    return (x + y) * (x + y + 1) // 2 + y


def described(
    nodes: Nodes,
    links: Iterable[tuple[int, int, float]],
    pieces: Sequence[str],
    facts: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Nodes that have an edge, and all tokens and logits; `facts` gives slug, model and pruning.

    Features are called "cross layer transcoder" whatever they are: the schema knows no other name.
    """
    ids = nodes.ids
    edges = [{"source": ids[source], "target": ids[target], "weight": weight} for source, target, weight in links]
    joined = {edge[end] for edge in edges for end in ("source", "target")}
    said = facts.get("logit_tokens", {})
    every = (_node(nodes, n, name, said) for n, name in enumerate(ids))
    kept = [each for each in every if each["node_id"] in joined or each["feature_type"] in ("embedding", "logit")]
    metadata = {
        "slug": str(facts["slug"]),
        "scan": str(facts.get("model", "")),
        "transcoder_list": [],
        "prompt_tokens": list(pieces),
        "prompt": "".join(pieces),
        "node_threshold": facts.get("node_threshold"),
        "schema_version": 1,
    }
    supernodes = [[label, *members] for label, members in groups.items()]
    query = {"pinnedIds": [], "supernodes": supernodes, "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": query, "nodes": kept, "links": edges}


def _node(nodes: Nodes, n: int, name: str, said: Mapping[str, str]) -> dict[str, Any]:
    kind, layer, index, position = (int(getattr(nodes, field)[n]) for field in ("kind", "layer", "index", "position"))
    best = kind == LOGIT and nodes.probability[n] == np.max(nodes.probability)
    spelled, feature, shown = {
        FEATURE: (f"{layer}_{index}-0", cantor(layer, index), str(layer)),
        ERROR: (f"{layer}_-1-{position}", -1, str(layer)),
        TOKEN: (f"E_{index}-{position}", position, "E"),
        LOGIT: (f"L_{index}-{position}", index, str(layer + 1)),
    }[kind]
    probability = float(nodes.probability[n])
    return {
        "node_id": name,
        "feature": feature,
        "layer": shown,
        "ctx_idx": position,
        "feature_type": TYPES[kind],
        "token_prob": probability,
        "is_target_logit": bool(best),
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": spelled,
        "clerp": f'Output "{said.get(str(index), index)}" (p={probability:.3f})' if kind == LOGIT else "",
        "influence": None if kind == LOGIT else float(nodes.cumulative[n]),
        "activation": float(nodes.activation[n]) if kind == FEATURE else None,
    }
