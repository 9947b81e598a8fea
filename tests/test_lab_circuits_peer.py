"""circuit-tracer's graph of the same model and transcoders, edge by edge: as it was written, and as it is made now."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import circuits_peer
from circuits_peer import CASES, FIXTURES, LOGITS
from circuits_small import TOKENS, tokenizer
from qwen_lab import circuits
from qwen_lab.circuits.nodes import LOGIT
from tolerances import LOGITS_F32, SAME_F32


@functools.cache
def ours(case: str) -> circuits.Graph:
    options = circuits.Options(max_features=None, batch=16, logits=LOGITS, probability=1.0)
    model, transcoders = circuits_peer.case(case)
    return circuits.trace(model, tokenizer(), transcoders, TOKENS, options)


def named(graph: circuits.Graph) -> dict[tuple[str, str], float]:
    """(source, target) -> weight."""
    ids, edges = graph.nodes.ids, graph.edges
    ends = zip(edges.source, edges.target, edges.weight, strict=True)
    return {(ids[source], ids[target]): float(weight) for source, target, weight in ends}


def equal_to_ours(path: Path, case: str) -> None:
    """Features, logits, every weight, what pruning keeps, and both scores."""
    theirs = safetensors.numpy.load_file(path)
    graph, layers = ours(case), circuits_peer.case(case)[0].config.layers
    fired, logits = graph.fired, graph.nodes.kind == LOGIT
    np.testing.assert_array_equal(np.stack([fired.layer, fired.position, fired.latent], axis=1), theirs["features"])
    np.testing.assert_allclose(fired.value, theirs["values"], **SAME_F32)
    np.testing.assert_array_equal(graph.nodes.index[logits], theirs["logit_ids"])
    np.testing.assert_allclose(graph.nodes.probability[logits], theirs["probability"], **SAME_F32)

    last = len(TOKENS) - 1
    ids = [f"{layer}_{latent}_{position}" for layer, position, latent in theirs["features"]]
    ids += [f"{layer}_-1_{position}" for layer in range(layers) for position in range(last + 1)]
    ids += [f"E_{token}_{position}" for position, token in enumerate(TOKENS)]
    ids += [f"{layers + 1}_{token}_{last}" for token in theirs["logit_ids"]]
    ends = [(ids[source], ids[target]) for source, target in zip(theirs["source"], theirs["target"], strict=True)]
    weights = dict(zip(ends, theirs["weight"].tolist(), strict=True))
    traced, found = set(graph.nodes.ids), named(graph)  # features that move no logit are not traced here
    weights = {pair: weight for pair, weight in weights.items() if pair[1] in traced}
    assert len(found) > 300
    pairs = sorted(found.keys() | weights.keys())
    np.testing.assert_allclose(
        [found.get(pair, 0.0) for pair in pairs], [weights.get(pair, 0.0) for pair in pairs], **SAME_F32
    )

    small = graph.prune()
    assert set(small.nodes.ids) == {ids[n] for n in np.flatnonzero(theirs["kept_nodes"])}
    assert named(small).keys() == {ends[n] for n in np.flatnonzero(theirs["kept_edges"])}
    scores = [graph.facts["replacement_score"], graph.facts["completeness_score"]]
    np.testing.assert_allclose(scores, theirs["scores"], **LOGITS_F32)


@pytest.mark.parametrize("case", CASES)
def test_a_graph_is_the_one_that_circuit_tracer_wrote(case: str):
    path = FIXTURES / "graphs" / f"{case}.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata().keys() >= {"circuit-tracer", "transformer-lens", "torch"}, "the versions that wrote it"
    equal_to_ours(path, case)


@pytest.mark.peer
def test_a_graph_is_the_one_that_circuit_tracer_makes(tmp_path: Path):
    if circuits_peer.PYTHON not in os.environ:
        pytest.importorskip("circuit_tracer")
    for case, path in circuits_peer.ask(tmp_path).items():
        equal_to_ours(path, case)
