"""What becomes of a graph: features held at values, Neuronpedia's JSON, a page, the command."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import qwen_eqx
import trace_circuit
from circuits_small import EVERYTHING, KINDS, TOKENS, tokenizer, transcoders, whole
from qwen_lab import circuits
from qwen_lab.circuits import neuronpedia
from qwen_lab.circuits.graph import Graph
from qwen_lab.circuits.nodes import ERROR, FEATURE, LOGIT, TOKEN
from qwen_lab.errors import InputError
from running import run
from tolerances import LOGITS_F32


def strongest(graph: Graph, count: int) -> list[str]:
    nodes = graph.nodes
    return [nodes.ids[n] for n in np.argsort(-nodes.influence) if nodes.kind[n] == FEATURE][:count]


def named(graph: Graph, kind: int, count: int) -> list[str]:
    """The nodes of a kind with the strongest edges to the first logit."""
    nodes, edges = graph.nodes, graph.edges
    into = edges.target == np.flatnonzero(nodes.kind == LOGIT)[0]
    size = np.bincount(edges.source[into], np.abs(edges.weight[into]), minlength=len(nodes))
    return [nodes.ids[n] for n in np.argsort(-size) if nodes.kind[n] == kind][:count]


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_else_frozen_logits_change_by_the_sum_of_edges(kind: str):
    """Of features held at activations, and of errors and tokens held at multiples of what they wrote."""
    (model, some), graph = transcoders(kind), whole(kind)
    nodes, held = graph.nodes, dict(zip(strongest(graph, 3), (0.0, 2.5, -1.0), strict=True))
    held |= dict(zip(named(graph, ERROR, 3), (0.0, 1.0, -2.0), strict=True))
    held |= dict(zip(named(graph, TOKEN, 2), (0.0, 3.0), strict=True))
    outcome = circuits.intervene(model, some, graph, held)
    size = 0.0
    for logit in np.flatnonzero(nodes.kind == LOGIT):
        expected = 0.0
        for name, value in held.items():
            at = nodes.find(name)
            edge = (graph.edges.source == at) & (graph.edges.target == logit)
            was = float(nodes.activation[at]) if nodes.kind[at] == FEATURE else 1.0
            expected += float(graph.edges.weight[edge].sum()) * (value / was - 1)
        change = outcome.frozen - outcome.plain
        found = change[nodes.index[logit]] - change.mean()
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
        size = max(size, abs(expected))
    assert size > 0.05
    assert np.abs(outcome.free - outcome.plain).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_errors_and_tokens_are_held_in_the_model_itself(kind: str):
    """As they were: nothing changes. Without them: the model that is edited so."""
    (model, some), graph = transcoders(kind), whole(kind)
    same = dict.fromkeys((*named(graph, ERROR, 2), *named(graph, TOKEN, 2)), 1.0)
    outcome = circuits.intervene(model, some, graph, same)
    np.testing.assert_allclose(outcome.free, outcome.plain, **LOGITS_F32)
    np.testing.assert_allclose(outcome.frozen, outcome.plain, **LOGITS_F32)
    outcome = circuits.intervene(model, some, graph, {f"E_{TOKENS[2]}_2": 0.0})
    without = qwen_eqx.Ablate(site="hook_embed", where=[2])
    expected, _ = model.run_with_capture(TOKENS, [], edits=[without], logits="last")
    np.testing.assert_allclose(outcome.free, expected, **LOGITS_F32)
    last, end = model.config.layers - 1, len(TOKENS) - 1
    r = circuits.replace(model, some, TOKENS)
    error = np.asarray(r.passed.mlp_out[last, end]) - r.made[last, end]
    outcome = circuits.intervene(model, some, graph, {f"{last}_-1_{end}": 0.0})
    np.testing.assert_allclose(outcome.free, model.logits(r.passed.last[end] - error), **LOGITS_F32)
    first = circuits.intervene(model, some, graph, {"0_-1_0": 0.0})
    np.testing.assert_allclose(first.free, first.plain, **LOGITS_F32)  # the first position's MLPs are not replaced


def test_a_graph_does_not_depend_on_the_mesh():
    (model, some), expected = transcoders("cross"), whole("cross")
    many = qwen_eqx.shard(model, qwen_eqx.make_mesh("data=1,model=2"))
    found = circuits.trace(many, tokenizer(), some, TOKENS, EVERYTHING)
    assert found.nodes.ids == expected.nodes.ids
    order, other = (np.lexsort((edges.source, edges.target)) for edges in (found.edges, expected.edges))
    np.testing.assert_array_equal(found.edges.source[order], expected.edges.source[other])
    np.testing.assert_allclose(found.edges.weight[order], expected.edges.weight[other], **LOGITS_F32)


def test_a_feature_held_at_its_own_value_changes_nothing_and_the_last_layers_go_straight_to_the_norm():
    (model, some), graph = transcoders("cross"), whole("cross")
    nodes = graph.nodes
    same = {name: float(nodes.activation[nodes.find(name)]) for name in strongest(graph, 4)}
    outcome = circuits.intervene(model, some, graph, same)
    np.testing.assert_allclose(outcome.free, outcome.plain, **LOGITS_F32)
    np.testing.assert_allclose(outcome.frozen, outcome.plain, **LOGITS_F32)
    last = model.config.layers - 1
    at = np.flatnonzero((nodes.kind == FEATURE) & (nodes.layer == last) & (nodes.position == len(TOKENS) - 1))[0]
    x = model.run_with_capture(TOKENS, [f"blocks.{last}.hook_resid_post"])[1][f"blocks.{last}.hook_resid_post"][-1]
    row = some.decoder_rows(last, np.asarray([nodes.index[at]]))[0, 0]
    outcome = circuits.intervene(model, some, graph, {nodes.ids[at]: 0.0})
    expected = model.logits(x - nodes.activation[at] * row)
    np.testing.assert_allclose(outcome.free, expected, **LOGITS_F32)


def test_a_group_is_held_as_its_members_and_a_logit_is_refused():
    (model, some), graph = transcoders("cross"), whole("cross")
    names = [*strongest(graph, 2), *named(graph, ERROR, 1)]
    grouped = dataclasses.replace(graph, groups={"rule": names})
    one = circuits.intervene(model, some, grouped, {"rule": 0.0})
    other = circuits.intervene(model, some, graph, dict.fromkeys(names, 0.0))
    np.testing.assert_array_equal(one.free, other.free)
    logit = named(graph, LOGIT, 1)[0]
    with pytest.raises(InputError, match=f"found '{logit}', a logit, expected a feature"):
        circuits.intervene(model, some, graph, {logit: 0.0})
    with pytest.raises(InputError, match="found 'no', expected one of the graph's"):
        circuits.intervene(model, some, graph, {"no": 0.0})
    with pytest.raises(InputError, match="expected each node once"):
        circuits.intervene(model, some, grouped, {"rule": 0.0, names[0]: 1.0})


def test_neuronpedias_json(tmp_path: Path):
    graph = dataclasses.replace(whole("cross").prune(0.9), groups={"rule": strongest(whole("cross"), 2)})
    graph.neuronpedia(tmp_path / "small.json")
    told = json.loads((tmp_path / "small.json").read_text())
    assert set(told) == {"metadata", "qParams", "nodes", "links"}
    assert told["metadata"]["schema_version"] == 1
    assert told["metadata"]["slug"] == "small"
    assert told["metadata"]["node_threshold"] == 0.9
    assert told["qParams"]["supernodes"] == [["rule", *strongest(whole("cross"), 2)]]
    names = [node["node_id"] for node in told["nodes"]]
    assert len(set(names)) == len(names)
    assert {end for link in told["links"] for end in (link["source"], link["target"])} <= set(names)
    assert len(told["links"]) == len(graph.edges)
    layers = transcoders("cross")[0].config.layers
    for node in told["nodes"]:
        layer, index, position = node["node_id"].split("_")
        assert node["ctx_idx"] == int(position)
        if node["feature_type"] == "logit":
            assert layer == node["layer"] == str(layers + 1)
        elif node["feature_type"] == "embedding":
            assert layer == "E"
            assert int(index) == TOKENS[int(position)]
        elif node["feature_type"] == "cross layer transcoder":
            assert unpaired(node["feature"]) == (int(layer), int(index))
        else:
            assert index == "-1"
    assert sum(node["is_target_logit"] for node in told["nodes"]) == 1


def unpaired(number: int) -> tuple[int, int]:
    """The two numbers whose Cantor pair this is."""
    total = int((np.sqrt(8 * number + 1) - 1) // 2)
    y = number - total * (total + 1) // 2
    return total - y, y


def test_cantors_pairs_are_told_apart():
    pairs = [(x, y) for x in range(12) for y in range(12)]
    assert [unpaired(neuronpedia.cantor(*pair)) for pair in pairs] == pairs


def test_a_page_holds_its_graph_and_no_text_of_it_runs(tmp_path: Path):
    graph = whole("cross").prune()
    evil = "</script><script>alert(1)</script><!--"
    grid = {"title": evil, "cells": [[0, 9]], "positions": [[2, -1]]}
    pieces = [evil, *graph.pieces[1:]]
    dataclasses.replace(graph, pieces=pieces, grids=[grid], facts=graph.facts | {"what": evil}).page(
        tmp_path / "page.html", title=evil
    )
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2
    assert "alert(1)</script>" not in text
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert len(data["links"]) == len(graph.edges)
    assert data["metadata"]["prompt_tokens"] == pieces
    assert data["grids"] == [grid]
    for node in data["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            layer, latent, position = node["node_id"].split("_")
            assert [int(position), pytest.approx(node["activation"], abs=1e-3)] in data["fires"][f"{layer}_{latent}"]
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_the_command_traces_a_cell_of_a_puzzle_that_is_solved(tmp_path: Path):
    config = trace_circuit.Config(task="mirror-37", max_features=24, batch=16, pages=1, out=tmp_path)
    said = run(trace_circuit, config)
    assert "the model says '4'" in said
    graph = Graph.load(tmp_path)
    assert graph.facts["traced_features"] == 24
    assert graph.facts["model"] == "tiny-arc"
    colours = [grid["cells"][0][0] for grid in graph.grids if grid["title"] == "right answer"]
    assert [str(colour) for colour in colours] == list(graph.facts["logit_tokens"].values())
    for grid in graph.grids:
        for row, places in zip(grid["cells"], grid["positions"], strict=True):
            for colour, place in zip(row, places, strict=True):
                assert place < 0 or graph.pieces[place].strip() == str(colour)
    assert len(graph.tokens) == len(graph.pieces)
    (address,) = set(re.findall(r'"pages":"(.*?)"', (tmp_path / "circuit.html").read_text()))
    page, _, anchor = address.format(layer=1, latent=330).partition("#")  # of one of the strongest
    assert anchor == "/1/330"
    columns = ((tmp_path / page).parent / "data" / "1" / "index.js").read_text()
    assert 330 in json.loads(columns.partition(",")[2][:-3])["latent"]
    assert set(trace_circuit.WRITTEN) <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="--hold: found '1_2', expected a node's name and a number"):
        run(trace_circuit, dataclasses.replace(config, hold=("1_2",), out=tmp_path / "other"))
    with pytest.raises(InputError, match="--task: found no 'nothing' in procedural/3-6, expected one of its tasks"):
        run(trace_circuit, dataclasses.replace(config, task="nothing", out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
