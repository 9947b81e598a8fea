"""Attribution graphs: exact against brute force in float64, whatever the batch; influence by its definition."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
import qwen_eqx
from circuits_small import KINDS, TOKENS, traced, transcoders, whole
from qwen_eqx.model.frozen import Targets
from qwen_lab import circuits
from qwen_lab.circuits import influence, rows
from qwen_lab.circuits.graph import Graph
from qwen_lab.circuits.influence import Edges
from qwen_lab.circuits.nodes import ERROR, FEATURE, LOGIT, TOKEN
from qwen_lab.circuits.tracing import Logits, Tracer
from qwen_lab.errors import InputError
from tolerances import LOGITS_F32, SAME_F32


@pytest.mark.parametrize("kind", KINDS)
def test_with_errors_the_replacement_changes_no_logit(kind: str):
    model, some = transcoders(kind)
    r = circuits.replace(model, some, TOKENS)
    assert float(qwen_eqx.effect(model, TOKENS, r.edits()).change) == 0
    assert np.abs(r.made - np.asarray(r.passed.mlp_out)).max() > 0.01, "there is something to make up for"


@pytest.mark.parametrize("kind", KINDS)
def test_edges_and_biases_add_up_to_what_each_target_reads(kind: str):
    """To a feature's value before the nonlinearity, here also its value; to a logit less the mean of all."""
    graph = whole(kind)
    nodes, (model, _) = graph.nodes, transcoders(kind)
    sums = np.bincount(graph.edges.target, graph.edges.weight, minlength=len(nodes)) + nodes.bias + nodes.left_out
    feature, logit = nodes.kind == FEATURE, nodes.kind == LOGIT
    np.testing.assert_allclose(sums[feature], nodes.activation[feature], **LOGITS_F32)
    logits = np.asarray(model(jnp.asarray(TOKENS))[-1])
    np.testing.assert_allclose(sums[logit], (logits - logits.mean())[nodes.index[logit]], **LOGITS_F32)
    assert not np.isin(graph.edges.target, np.flatnonzero(~feature & ~logit)).any()
    assert np.sum(feature) > 10


def brute_force(kind: str, graph: Graph) -> np.ndarray:
    """[targets sources] in float64: each source is taken out of the frozen model, and every reading read again."""
    (model, some), nodes = transcoders(kind), graph.nodes
    normed = some.input_site == "mlp.hook_in"
    _, sites = oracles.decoder(model, TOKENS)
    config = model.config
    scale = [1 / np.sqrt((sites[n, "resid_mid"] ** 2).mean(1) + config.norm_eps) for n in range(config.layers)]

    def read(layer: int, mid: np.ndarray) -> np.ndarray:
        gain = np.asarray(model.blocks[layer].mlp_norm.weight, np.float64)
        return mid * scale[layer][:, None] * gain if normed else mid

    def skip(layer: int, mid: np.ndarray) -> np.ndarray:
        weight = some.skip(layer)
        return np.zeros_like(mid) if weight is None else read(layer, mid) @ np.asarray(weight, np.float64)

    streams, embed, written = oracles.frozen_decoder(model, TOKENS, skip)
    written = written - np.stack([skip(n, sites[n, "resid_mid"]) for n in range(config.layers)])
    last = sites[config.layers - 1, "resid_post"]
    norm = np.asarray(model.norm.weight, np.float64) / np.sqrt((last[-1] ** 2).mean() + config.norm_eps)
    head = np.asarray(model.embed.table if model.head is None else model.head.weight, np.float64)

    def readings(embed: np.ndarray, written: np.ndarray) -> np.ndarray:
        mids, end = streams(embed, written)
        found = np.zeros(len(nodes))
        for n in np.flatnonzero((nodes.kind == FEATURE) | (nodes.kind == LOGIT)):
            if nodes.kind[n] == LOGIT:
                logits = head @ (end[-1] * norm)
                found[n] = logits[nodes.index[n]] - logits.mean()
            else:
                row, bias = some.encoder_rows(int(nodes.layer[n]), np.asarray([nodes.index[n]]))
                x = read(nodes.layer[n], mids[nodes.layer[n]])[nodes.position[n]]
                found[n] = np.asarray(row[0], np.float64) @ x + float(bias[0])
        return found

    features = np.flatnonzero(nodes.kind == FEATURE)
    made = np.stack([np.broadcast_to(np.asarray(some.bias(n), np.float64), embed.shape) for n in range(config.layers)])

    def write(n: int) -> np.ndarray:
        rows = some.decoder_rows(int(nodes.layer[n]), np.asarray([nodes.index[n]]))[0]
        out = np.zeros_like(written)
        out[nodes.layer[n] : nodes.layer[n] + len(rows), nodes.position[n]] = np.asarray(rows) * nodes.activation[n]
        return out

    made = made + sum(write(n) for n in features)
    whole, effects = readings(embed, written), np.zeros((len(nodes), len(nodes)))
    for n in range(len(nodes)):
        layer, position, without = nodes.layer[n], nodes.position[n], [embed.copy(), written.copy()]
        if nodes.kind[n] == TOKEN:
            without[0][position] = 0
        elif nodes.kind[n] == FEATURE:
            without[1] -= write(n)
        elif nodes.kind[n] == ERROR and position > 0:
            without[1][layer, position] = made[layer, position]
        effects[:, n] = whole - readings(*without)
    return effects


@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_what_brute_force_over_all_pairs_finds(kind: str):
    """Of the features that are traced; the others, without any path to a logit, are still sources for the sums."""
    everything = traced(kind, circuits.Options(max_features=None, batch=16, logits=3, probability=1.0))
    expected, nodes = brute_force(kind, everything), everything.nodes
    found = np.zeros_like(expected)
    found[everything.edges.target, everything.edges.source] = everything.edges.weight
    size = np.abs(expected).max()
    np.testing.assert_allclose(found / size, expected / size, rtol=1e-4, atol=2e-6)
    assert np.sum(nodes.kind == LOGIT) == 3


def test_a_graph_does_not_depend_on_the_batch_nor_on_the_order_of_targets():
    one, other = whole("cross"), traced("cross", circuits.Options(max_features=None, batch=5, queue=3, logits=3))
    assert one.nodes.ids == other.nodes.ids
    np.testing.assert_array_equal(one.edges.source, other.edges.source)
    np.testing.assert_array_equal(one.edges.target, other.edges.target)
    np.testing.assert_allclose(one.edges.weight, other.edges.weight, **SAME_F32)
    model, some = transcoders("cross")
    r = circuits.replace(model, some, TOKENS)
    rng = np.random.default_rng(0)
    layer, position, order = rng.integers(3, size=16), rng.integers(8, size=16), rng.permutation(16)
    vector = jnp.asarray(rng.normal(size=(16, model.config.d_model)).astype(np.float32))
    rows = circuits.direct_effects(r, layer, position, vector, 16)
    again = circuits.direct_effects(r, layer[order], position[order], vector[order], 16)
    np.testing.assert_allclose(again, rows[order], **SAME_F32)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 999)), min_size=1, max_size=60), st.integers(1, 9))
def test_batches_hold_every_target_once(targets: list[tuple[int, int]], size: int):
    layer, position = np.asarray(targets).T
    found = list(rows.batches(layer, position, size, 1000))
    assert max(map(len, found)) <= size
    assert len(found) <= -(-len(targets) // size) + len(rows.ends(1000)) - 1
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(len(targets)))


def test_a_sweep_that_ends_at_the_latest_target_finds_the_same(monkeypatch: pytest.MonkeyPatch):
    (model, some), rng = transcoders("cross"), np.random.default_rng(0)
    r = circuits.replace(model, some, TOKENS)
    layer, vector = np.asarray([0, 2, 1, 2]), jnp.asarray(rng.normal(size=(4, model.config.d_model)).astype(np.float32))
    for latest in (2, 3):
        position = np.asarray([1, latest, 2, 0])
        monkeypatch.setattr(rows, "STEP", 256)
        whole = circuits.direct_effects(r, layer, position, vector, 4)
        monkeypatch.setattr(rows, "STEP", 3)
        assert rows.ends(len(TOKENS)) == [3, 6, 8]
        np.testing.assert_allclose(circuits.direct_effects(r, layer, position, vector, 4), whole, **SAME_F32)


def test_no_matrix_of_nodes_by_nodes_is_made():
    """Of 17,000 nodes one would take 1.2 GB even in float32; edges alone take 12 bytes each."""
    nodes, seen = 17_000, 6
    depth = np.sort(np.random.default_rng(0).integers(24, size=nodes))
    begin = np.searchsorted(depth, depth)
    source = np.random.default_rng(1).integers(np.maximum(begin, 1)[:, None], size=(nodes, seen))
    target = np.repeat(np.arange(nodes), seen)[np.repeat(begin > 0, seen)]
    source = source[begin > 0].reshape(-1)
    edges = Edges(source.astype(np.int32), target.astype(np.int32), np.ones(len(source), np.float32))
    first, ends = np.where(depth == 23, 1.0, 0.0), (depth == 0) | (depth == 23)
    tracemalloc.start()
    try:
        influence.prune(edges, first, depth, always=ends, fed=~ends, node_share=0.8, edge_share=0.98)
        influence.scores(edges, first, depth, depth == 1, depth == 0)
        Edges.joined([edges[np.arange(len(edges) // 2)], edges])
        assert tracemalloc.get_traced_memory()[1] < 20 * 12 * len(edges)
    finally:
        tracemalloc.stop()


def test_what_is_kept_of_a_trace_is_less_than_its_edges():
    """8 features of all that fire are traced: the arrays of the tracer are rows of these, and vectors over sources."""
    model, some = transcoders("plain")
    r, options = circuits.replace(model, some, TOKENS), circuits.Options(batch=4, logits=3)
    tracer = Tracer(some, r, Logits.of(model, r, options), options)
    tracer.add_logits()
    tracer.add_features(np.arange(0, 24, 3))
    blocks = [block for known in tracer.levels.values() for block in known]
    edges = sum(map(len, tracer.parts))
    assert edges > 100
    assert all(block.weight.any(axis=0).all() for block in blocks), "sources that no target has are not kept"
    assert all(array.base is None for block in blocks for array in vars(block).values()), "no dense row is kept alive"
    assert sum(array.nbytes for block in blocks for array in vars(block).values()) < 12 * edges
    others = [value for value in vars(tracer).values() if isinstance(value, np.ndarray)]
    assert all(value.shape == (r.constant + 3,) for value in others)


def test_memory_is_known_beforehand():
    """What a sweep reads, to the byte but for the padding of rows; what it takes beside, within what the compiler plans."""
    model, some = transcoders("plain")
    r, batch = circuits.replace(model, some, TOKENS), 16
    room = circuits.Room.of(model.config, r.seq, r.sources.rows.shape[1] * r.sources.rows.shape[2], batch)
    assert room.frozen == sum(leaf.nbytes for leaf in jax.tree.leaves(r.frozen))
    assert room.sources == r.sources.rows.nbytes + r.sources.embed.nbytes
    number = jnp.zeros(batch, jnp.int32)
    targets = Targets(number, number, jnp.zeros((batch, model.config.d_model)))
    blocks = r.sources.rows.shape[1]
    plan = rows.swept.lower(r.frozen, r.sources, targets, r.seq, blocks).compile().compiled.memory_analysis()
    assert room.sweep / 3 < plan.temp_size_in_bytes + plan.output_size_in_bytes < 3 * room.sweep


def test_a_cap_keeps_the_features_of_most_influence_and_sums_the_others():
    few = traced("plain", circuits.Options(max_features=6, queue=2, batch=16, logits=3))
    nodes = few.nodes
    assert np.sum(nodes.kind == FEATURE) == few.facts["traced_features"] == 6
    sums = np.bincount(few.edges.target, few.edges.weight, minlength=len(nodes)) + nodes.bias + nodes.left_out
    read = (nodes.kind == FEATURE) | (nodes.kind == LOGIT)
    np.testing.assert_allclose(sums[read], nodes.reading[read], **SAME_F32)
    assert np.abs(nodes.left_out[read]).max() > 0.01
    every = whole("plain").nodes
    strongest = [every.ids[n] for n in np.argsort(-every.influence) if every.kind[n] == FEATURE]
    assert strongest[0] in nodes.ids


@st.composite
def dags(draw: st.DrawFn) -> tuple[Edges, np.ndarray, np.ndarray]:
    """Edges from less deep nodes to deeper ones, what the deepest start with, and depths."""
    depth = np.sort(draw(st.lists(st.integers(0, 4), min_size=3, max_size=14)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pairs = [(s, t) for t in range(len(depth)) for s in range(len(depth)) if depth[s] < depth[t] and rng.random() < 0.6]
    first = np.where(depth == depth[-1], rng.random(len(depth)), 0.0)
    source, target = np.asarray(pairs, np.int32).reshape(-1, 2).T
    return Edges(source, target, rng.normal(size=len(pairs)).astype(np.float32)), first, depth


def dense(edges: Edges, nodes: int) -> np.ndarray:
    """[targets sources], rows of shares."""
    matrix = np.zeros((nodes, nodes))
    matrix[edges.target, edges.source] = np.abs(edges.weight)
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-30)


@given(dags())
def test_influence_is_the_sum_over_all_paths(drawn: tuple[Edges, np.ndarray, np.ndarray]):
    edges, first, depth = drawn
    paths = np.linalg.inv(np.eye(len(first)) - dense(edges, len(first)))
    found = influence.flow(edges, edges.shares(len(first)), first, depth)
    np.testing.assert_allclose(found, first @ paths, rtol=1e-9, atol=1e-12)


def pruned(drawn: tuple[Edges, np.ndarray, np.ndarray], node_share: float, edge_share: float) -> influence.Kept:
    edges, first, depth = drawn
    ends = (depth == depth[0]) | (depth == depth[-1])
    return influence.prune(
        edges, first, depth, always=ends, fed=~ends, node_share=node_share, edge_share=edge_share
    )  # fmt: skip


@given(dags(), st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_pruning_is_monotone(drawn: tuple[Edges, np.ndarray, np.ndarray], shares: list[float]):
    """More of the edges' scores keeps all that less kept; and so do nodes, as long as all edges between them stay."""
    less, more = (pruned(drawn, 0.8, share) for share in shares)
    assert (less.nodes <= more.nodes).all()
    assert (less.edges <= more.edges).all()
    less, more = (pruned(drawn, share, 1.0) for share in shares)
    assert (less.nodes <= more.nodes).all()
    assert (less.edges <= more.edges).all()
    edges, kept = drawn[0], more
    assert (kept.edges <= (kept.nodes[edges.source] & kept.nodes[edges.target])).all()


def test_what_is_pruned_is_named_by_shares_and_stays_in_the_sums():
    graph = whole("cross")
    small = graph.prune(0.6, 0.9)
    nodes = small.nodes
    assert 0 < len(small.edges) < len(graph.edges)
    assert np.sum(nodes.kind == TOKEN) == len(TOKENS), "tokens stay"
    assert (nodes.influence[nodes.kind == FEATURE] > 0).all()
    sums = np.bincount(small.edges.target, small.edges.weight, minlength=len(nodes)) + nodes.bias + nodes.left_out
    read = (nodes.kind == FEATURE) | (nodes.kind == LOGIT)
    np.testing.assert_allclose(sums[read], nodes.reading[read], **SAME_F32)
    with pytest.raises(InputError, match=r"found 1\.5, expected a share"):
        graph.prune(1.5)


def test_scores_are_one_where_nothing_is_an_error():
    graph = whole("plain")
    assert 0 < graph.facts["replacement_score"] < 1
    assert 0 < graph.facts["completeness_score"] < 1
    nodes = graph.nodes
    errors, tokens = nodes.kind == ERROR, nodes.kind == TOKEN
    free = graph.edges[~errors[graph.edges.source]]
    assert influence.scores(free, graph.first, nodes.layer, errors, tokens) == pytest.approx((1, 1))


def test_a_saved_graph_is_read_again(tmp_path):
    graph = whole("cross")
    graph.save(tmp_path)
    again = Graph.load(tmp_path)
    for part in ("nodes", "edges"):
        for name, value in vars(getattr(graph, part)).items():
            np.testing.assert_array_equal(getattr(getattr(again, part), name), value)
    assert (again.tokens, again.pieces, again.facts) == (graph.tokens, graph.pieces, graph.facts)
    (tmp_path / "graph.json").write_text("{}")
    with pytest.raises(InputError, match=r"found no graph .*expected what Graph.save wrote"):
        Graph.load(tmp_path)


def test_what_does_not_fit_is_one_line():
    model, _ = transcoders("plain")
    _, other = transcoders("cross")
    with pytest.raises(InputError, match="found 2 layers of width 16, expected the model's 2 of width 12"):
        circuits.replace(model, other, TOKENS)
    with pytest.raises(InputError, match="batch: found 0, expected at least 1"):
        circuits.Options(batch=0)
