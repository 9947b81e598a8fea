"""Training: a step is its equations in float64, and how the work is cut up changes nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import qwen_eqx
import tiny
import tolerances
from qwen_eqx import training
from qwen_eqx.model.attention import attend
from qwen_eqx.model.causal import attend_causally
from qwen_eqx.training import step as steps

SEQ = 9


def batch(seed: int = 0, rows: int = 4, seq: int = SEQ, vocab: int = 53) -> training.Batch:
    """Random documents of which the end is padded, some tokens have no weight, and a few last ones are the answer."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, seq + 1, rows)
    real = np.arange(seq)[None, :] < lengths[:, None]
    weights = np.where(real, rng.choice([0.0, 0.5, 1.0], (rows, seq)), 0).astype(np.float32)
    answer = real & (np.arange(seq)[None, :] >= lengths[:, None] - 2)
    tokens = np.where(real, rng.integers(0, vocab, (rows, seq)), 0).astype(np.int32)
    return training.Batch(*map(jnp.asarray, (tokens, weights, answer)))


def stacked(*parts: training.Batch) -> training.Batch:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def loss_of(model: qwen_eqx.Qwen, given: training.Batch, **how) -> jax.Array:
    each = measured(model, given, **how)
    return each.loss.sum() / each.weight.sum()


gradient_of = eqx.filter_jit(eqx.filter_grad(loss_of))
measured = eqx.filter_jit(training.totals)
step = eqx.filter_jit(steps.step)


@eqx.filter_jit
def pulled(function, qkv, dz, *more):
    """The value, and the gradients of its product with dz."""
    value, back = jax.vjp(lambda *qkv: function(*qkv, *more), *qkv)
    return value, back(dz)


def oracle_loss(model: qwen_eqx.Qwen, given: training.Batch) -> float:
    """Σ weight · −log p / Σ weight, in float64."""
    total = 0.0
    for tokens, weights in zip(np.asarray(given.tokens), np.asarray(given.weights), strict=True):
        log_probs = oracles.log_softmax(oracles.decoder(model, tokens[:-1])[0])
        total -= (weights[1:] * log_probs[np.arange(len(tokens) - 1), tokens[1:]]).sum()
    return total / np.asarray(given.weights)[:, 1:].sum()


@settings(max_examples=8)
@given(st.sampled_from([1, 3, 112, 113, 240]), st.sampled_from([(1, 1), (2, 2), (1, 3)]), st.sampled_from([1, 3, 8]))
def test_causal_attention_is_attention_under_a_triangular_mask(seq: int, heads: tuple[int, int], rows: int):
    (kv_heads, group), d_head = heads, 4
    keys = jax.random.split(jax.random.key(seq), 4)
    q = jax.random.normal(keys[0], (rows, seq, kv_heads, group, d_head))
    k, v = (jax.random.normal(key, (rows, kv_heads, seq, d_head)) for key in keys[1:3])
    dz = jax.random.normal(keys[3], q.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((seq, seq), bool))[None], (rows, seq, seq))
    expected, back = pulled(lambda q, k, v, mask: attend(q, k, v, mask), (q, k, v), dz, mask)
    found, ours = pulled(attend_causally, (q, k, v), dz)
    np.testing.assert_allclose(found, expected, **tolerances.SAME_F32)
    for mine, plain in zip(ours, back, strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-4)


@settings(max_examples=8)
@given(st.sampled_from([5, 112, 240]), st.sampled_from([1, 3, 8]), st.integers(0, 2**31))
def test_pads_on_the_left_are_not_seen(seq: int, rows: int, seed: int):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (rows, seq, 2, 2, 4))
    k, v = (jax.random.normal(key, (rows, 2, seq, 4)) for key in keys[1:])
    pads = jnp.asarray(np.random.default_rng(seed).integers(0, seq, rows), jnp.int32)
    own = jnp.arange(seq)[None] >= pads[:, None]
    mask = jnp.tril(jnp.ones((seq, seq), bool))[None] & own[:, None]
    found, expected = attend_causally(q, k, v, pads), attend(q, k, v, mask)
    np.testing.assert_allclose(found[own], expected[own], **tolerances.SAME_F32)
    assert np.isfinite(found).all()
    wild = own[:, None, :, None]
    same = attend_causally(q, jnp.where(wild, k, 1e30), jnp.where(wild, v, 1e30), pads)
    np.testing.assert_array_equal(same[own], found[own])
    by_pushing = jax.jvp(lambda q: attend_causally(q, k, v, pads), (q,), (q,))[1]  # forward mode as well
    assert np.isfinite(by_pushing[own]).all()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_documents_read_for_training_are_a_plain_pass(name: str):
    model = tiny.model(name)
    tokens = jax.random.randint(jax.random.key(0), (3, 13), 0, model.config.vocab)
    plain, _ = model.forward(tokens, jnp.zeros(3, jnp.int32))
    for remat in (False, True):
        read = eqx.filter_jit(lambda model, tokens, remat=remat: model.read(tokens, remat=remat))
        np.testing.assert_allclose(read(model, tokens), plain, **tolerances.SAME_F32)


def test_the_loss_is_the_weighted_mean_in_float64():
    model = tiny.model("qwen3")
    np.testing.assert_allclose(loss_of(model, batch()), oracle_loss(model, batch()), rtol=1e-5)


def test_logits_piece_by_piece_change_nothing(monkeypatch):
    model, given = tiny.model("qwen3"), batch()
    whole = eqx.filter_jit(eqx.filter_value_and_grad(loss_of))(model, given)
    monkeypatch.setattr("qwen_eqx.training.loss.LOGITS_AT_ONCE", 5 * model.config.vocab)
    pieces = eqx.filter_jit(eqx.filter_value_and_grad(lambda *a: loss_of(*a)))(model, given)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(a, b, **tolerances.SAME_F32)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_tokens_without_weight_teach_nothing(seed: int):
    """A document behind a token without weight, and one that has none at all, leave the gradient as it is."""
    model, first = tiny.model("qwen3"), batch(seed)
    rng = np.random.default_rng(seed)
    last = np.asarray(first.weights).nonzero()
    ends = {row: last[1][last[0] == row].max(initial=0) for row in range(4)}
    tokens = np.asarray(first.tokens).copy()
    for row, end in ends.items():
        tokens[row, end + 1 :] = rng.integers(0, 53, SEQ - end - 1)
    if not np.asarray(first.weights)[:, 1:].any():
        return
    changed = eqx.tree_at(lambda b: b.tokens, first, jnp.asarray(tokens))
    for a, b in zip(
        jax.tree.leaves(gradient_of(model, first)), jax.tree.leaves(gradient_of(model, changed)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weights_are_relative():
    model, given = tiny.model("qwen3"), batch()
    twice = eqx.tree_at(lambda b: b.weights, given, 2 * given.weights)
    np.testing.assert_allclose(loss_of(model, twice), loss_of(model, given), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rematerialisation_changes_no_gradient(dtype: str):
    model, given = tiny.model("qwen3"), batch()
    plain = gradient_of(model, given, dtype=jnp.dtype(dtype))
    again = gradient_of(model, given, dtype=jnp.dtype(dtype), remat=True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        if dtype == "float32":
            np.testing.assert_allclose(a, b, **tolerances.SAME_F32)
        else:
            assert np.abs(a - b).max() <= tolerances.BF16_ROW * max(np.abs(a).max(), 1e-3)


def test_exact_is_what_greedy_decoding_writes():
    """The law that spares the measurement a generation: all answer tokens are the likeliest, or the answer differs."""
    model = tiny.model("qwen3")
    prompts = [[5, 9, 2], [7, 7], [1, 2, 3, 4], [50]]
    written = np.asarray(qwen_eqx.generate(model, prompts, max_new_tokens=3).tokens)
    for spoil in (None, 0, 2):
        tokens, answer = np.zeros((4, SEQ), np.int32), np.zeros((4, SEQ), bool)
        for row, prompt in enumerate(prompts):
            reply = written[row].copy()
            if spoil is not None:
                reply[spoil] = (reply[spoil] + 1) % 53
            tokens[row, : len(prompt) + 3] = [*prompt, *reply]
            answer[row, len(prompt) : len(prompt) + 3] = True
        given = training.Batch(jnp.asarray(tokens), jnp.asarray(answer, jnp.float32), jnp.asarray(answer))
        np.testing.assert_array_equal(measured(model, given).exact, np.full(4, float(spoil is None)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_batches_are_one_big_batch(optimizer: str):
    config = training.TrainConfig(steps=4, optimizer=optimizer, weight_decay=0.1)
    parts = [batch(seed) for seed in range(3)]
    big = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    one, of_one = step(training.init(tiny.model("qwen3"), config), stacked(big), config)
    three, of_three = step(training.init(tiny.model("qwen3"), config), stacked(*parts), config)
    np.testing.assert_allclose(of_one.gradient_norm, of_three.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(of_one.totals.mean(), of_three.totals.mean(), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.model), jax.tree.leaves(three.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)  # Adam's first step is the sign of a rounded gradient


def test_the_gradient_is_the_slope_of_the_loss_in_float64():
    model, given = tiny.model("qwen3"), batch()
    gradient = gradient_of(model, given)
    rng = np.random.default_rng(0)
    for _ in range(3):
        way = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), model)

        def moved(by: float, way=way) -> qwen_eqx.Qwen:
            return jax.tree.map(lambda leaf, to: np.asarray(leaf, np.float64) + by * to, model, way)

        slope = (oracle_loss(moved(1e-5), given) - oracle_loss(moved(-1e-5), given)) / 2e-5
        found = sum(
            float((np.asarray(a, np.float64) * b).sum())
            for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True)
        )
        np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-4)


def test_a_step_is_adamw_in_float64():
    """Warm-up, clipping, moments, decay of matrices alone (arXiv 1711.05101), two steps long."""
    config = training.TrainConfig(steps=10, learning_rate=3e-2, warmup_steps=4, weight_decay=0.2, clip_norm=0.5)
    state = training.init(tiny.model("qwen3"), config)
    weights = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.model)]
    first, second = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for number in range(2):
        gradient = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient_of(state.model, batch(number)))]
        norm = np.sqrt(sum((g**2).sum() for g in gradient))
        rate = 3e-2 * (number + 1) / 4
        state, metrics = step(state, stacked(batch(number)), config)
        np.testing.assert_allclose([metrics.gradient_norm, metrics.learning_rate], [norm, rate], rtol=1e-5)
        for index, g in enumerate(gradient):
            g = g * min(1, 0.5 / norm)
            first[index] = 0.9 * first[index] + 0.1 * g
            second[index] = 0.95 * second[index] + 0.05 * g**2
            mean, square = first[index] / (1 - 0.9 ** (number + 1)), second[index] / (1 - 0.95 ** (number + 1))
            decay = 0.2 * weights[index] if weights[index].ndim == 2 else 0
            weights[index] = weights[index] - rate * (mean / (np.sqrt(square) + 1e-8) + decay)
        for found, expected in zip(jax.tree.leaves(state.model), weights, strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_the_rate_rises_and_falls_along_a_cosine():
    config = training.TrainConfig(steps=110, learning_rate=2.0, warmup_steps=10, final_rate=0.25)
    np.testing.assert_allclose(config.rate(jnp.asarray([0, 4, 9, 10, 60, 110])), [0.2, 1, 2, 2, 1.25, 0.5], rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_fixed_batch_is_learned_by_heart(optimizer: str):
    config = training.TrainConfig(
        steps=150,
        learning_rate=1e-2,
        warmup_steps=10,
        optimizer=optimizer,
    )
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 53, (3, SEQ)), jnp.int32)
    given = training.Batch(tokens, jnp.ones(tokens.shape), jnp.ones(tokens.shape, bool))
    again = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None, None], (50, 1, *leaf.shape)), given)
    state = training.init(tiny.model("qwen3"), config)
    *_, (state, metrics) = training.fit(state, [again] * 9, config)
    assert int(state.step) == 150, "fit ends at config.steps"
    assert float(metrics.totals.mean()[-1]) < 0.02
    assert float(metrics.totals.exact_rate()[-1]) == 1


def test_calls_of_any_length_give_the_same_weights_bit_for_bit():
    config = training.TrainConfig(steps=4)
    each = [stacked(batch(seed)) for seed in range(4)]

    def trained(*calls: int) -> list[bytes]:
        state, begin = training.init(tiny.model("qwen3"), config), 0
        for size in calls:
            state, _ = training.run(state, stacked(*each[begin : begin + size]), config)
            begin += size
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

    assert trained(2, 2) == trained(2, 2)
    assert trained(2, 2) == trained(4)


def test_a_loss_that_is_not_finite_names_its_step_and_moves_nothing():
    config = training.TrainConfig(steps=5)
    good, bad = stacked(batch()), stacked(eqx.tree_at(lambda b: b.weights, batch(), batch().weights * jnp.inf))
    state, _ = training.run(training.init(tiny.model("qwen3"), config), stacked(good), config)
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state.model)]
    with pytest.raises(training.NotFinite, match=r"step 1: the loss or its gradient is not finite") as raised:
        list(training.fit(state, [stacked(bad, good, good)], config))
    for kept, leaf in zip(before, jax.tree.leaves(raised.value.state.model), strict=True):
        np.testing.assert_array_equal(kept, leaf)


def test_a_lora_changes_nothing_at_first_and_merges_into_what_it_computes():
    model, given = tiny.model("qwen2"), batch(vocab=97)
    wrapped = training.LoRA.wrap(model, rank=3, alpha=6.0, key=jax.random.key(1))
    tokens = given.tokens
    np.testing.assert_array_equal(wrapped.read(tokens), model.read(tokens))
    config = training.TrainConfig(steps=6, learning_rate=3e-2)
    state = training.init(wrapped, config)
    *_, (state, metrics) = training.fit(state, [stacked(*[stacked(given)] * 6)], config)
    losses = metrics.totals.mean()
    assert float(losses[-1]) < 0.9 * float(losses[0])
    merged = training.merge(state.model)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    np.testing.assert_allclose(merged.read(tokens), state.model.read(tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(merged.read(tokens) - model.read(tokens)).max() > 0.01
    for block, old in zip(state.model.blocks, model.blocks, strict=True):
        np.testing.assert_array_equal(block.attn.q.linear.weight, old.attn.q.weight)  # frozen
        np.testing.assert_array_equal(block.attn_norm.weight, old.attn_norm.weight)


def test_a_frozen_model_may_be_bfloat16():
    model = tiny.model("qwen3", "bfloat16")
    state = training.init(training.LoRA.wrap(model, rank=2, targets=("q", "v")), training.TrainConfig(steps=1))
    assert state.model.blocks[0].attn.q.linear.weight.dtype == jnp.bfloat16
    assert state.model.blocks[0].attn.q.a.dtype == jnp.float32
    state, _ = training.run(state, stacked(stacked(batch())), training.TrainConfig(steps=1))
    assert int(state.bad_step) == -1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps: found 0, expected a whole number of at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan"),
        ({"final_rate": 2.0}, "final_rate: found 2.0, expected a finite number from 0 to 1"),
        ({"b2": 1.0}, "b2: found 1.0, expected 0 to below 1"),
        ({"warmup_steps": 11}, "warmup_steps: found 11, expected 0 to steps=10"),
        ({"clip_norm": 0.0}, "eps, clip_norm: found 1e-08, 0.0, expected numbers above 0"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict, said: str):
    with pytest.raises(qwen_eqx.InputError) as raised:
        training.TrainConfig(**{"steps": 10, **fields})
    assert said in str(raised.value)


def test_wrong_calls_are_refused():
    model, config = tiny.model("qwen3"), training.TrainConfig(steps=1)
    with pytest.raises(qwen_eqx.InputError, match="found 2 steps, expected at most 1 of 1"):
        training.run(training.init(model, config), stacked(*[stacked(batch())] * 2), config)
    with pytest.raises(qwen_eqx.InputError, match="found 2 axes, expected steps, accumulate, batch, seq"):
        training.run(training.init(model, config), batch(), config)
    with pytest.raises(qwen_eqx.InputError, match="targets: found 'router'"):
        training.LoRA.wrap(model, rank=1, targets=("router",))
    with pytest.raises(qwen_eqx.InputError, match="one that holds LoRA already"):
        training.LoRA.wrap(training.LoRA.wrap(model, rank=1), rank=1)
