"""Training: sparse equals dense, sweeps equal separate runs, live equals replay, NaN stops, resume is exact."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from sae import training as train
from sae.data.buffer import ShuffleBuffer
from sae.errors import InputError
from sae.forms.objective import Hyper
from sae.training import checkpoint, loop, step

X = jax.random.normal(jax.random.key(1), (6, 32, 8))
ONE_SITE = [name for name, form in sae.FORMS.items() if not form.several_sites]  # the others: test_sae_crosscoder
K_FORMS = [name for name in ONE_SITE if "k" in sae.FORMS[name].details]


def start(form="topk", seed=0, k=2, config=None, d_sae=16, **changes):
    config = config or train.TrainConfig(steps=100, learning_rate=1e-2, **changes)
    extra = {"k": k} if form in K_FORMS else {}
    if form == "matryoshka":
        extra["widths"] = (d_sae // 2, d_sae)  # every prefix lengthens compilation
    module = sae.FORMS[form].init(d_model=8, d_sae=d_sae, key=jax.random.key(seed), **extra)
    return train.init(module, config, X[0]), config


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize("form", ONE_SITE)
def test_every_form_learns_in_bfloat16(form):
    """In float32 every form must find the toy's features (test_sae_synthetic), which asks for more."""
    state, config = start(form, product_dtype="bfloat16", sparsity=0.01, average_decay=0.9, clip_norm=1.0)
    many = jnp.concatenate([X] * 10)
    state, metrics = train.run(state, many, config)
    assert float(metrics.loss[-6:].mean()) < float(metrics.loss[:6].mean())
    assert int(state.step) == 60
    finished = train.finish(state)
    if state.module.unit_norm:
        meant = finished if config.frees(state.module) else state.module
        np.testing.assert_allclose(jnp.linalg.norm(meant.decoder, axis=-1), 1, rtol=1e-5)
    assert np.isfinite(np.asarray(finished(X[0]))).all()


@pytest.mark.parametrize("form", ["topk", "batchtopk", "jumprelu"])
def test_free_rows_of_any_length_mean_the_same(form):
    """The loss, what fires and the finished module see only ‖d_j‖ e_j and d_j / ‖d_j‖; the rows do change length."""
    state, config = start(form, free_norm=True, sparsity=0.01, bandwidth=2.0)
    lengths = jnp.exp(jax.random.normal(jax.random.key(4), (16,)))
    other = eqx.tree_at(lambda s: s.module, state, state.module.lengthened(lengths))
    take = eqx.filter_jit(lambda state: step.step(state, X[0], X[0], config))
    (after, found), (_, expected) = take(state), take(other)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4)
    np.testing.assert_allclose(train.finish(state)(X[0]), train.finish(other)(X[0]), atol=1e-5)
    before, grown = (jnp.linalg.norm(s.module.decoder, axis=-1) for s in (state, after))
    assert float(jnp.abs(grown - before).max()) > 1e-3


def test_jumprelu_sparsity_moves_thresholds_alone():
    """Rows of a length of their own must not offer the penalty another way: longer rows would raise θ‖d‖, not L0."""
    state, config = start("jumprelu", sparsity=0.0, bandwidth=2.0)
    pressed = eqx.tree_at(lambda s: s.hyper.sparsity, state, jnp.float32(1))
    take = eqx.filter_jit(lambda state: step.step(state, X[0], X[0], config)[0])
    free, held = take(state).module, take(pressed).module
    for name in ("encoder", "decoder", "b_enc", "b_dec"):
        np.testing.assert_array_equal(getattr(free, name), getattr(held, name))
    assert float(jnp.min(held.threshold - free.threshold)) > 0


@pytest.mark.parametrize(
    ("steps", "given", "expected"), [(500, None, 1), (2000, None, 0.25), (10_000, None, 0.025), (10_000, 0.5, 0.5)]
)
def test_biases_of_jumprelu_move_slower_the_longer_the_run(steps, given, expected):
    """By 1/s², at least 1/4s, s = steps · rate, or as told; the matrices do not slow down, nor do other forms."""
    config = train.TrainConfig(steps=steps, learning_rate=1e-3, bias_rate=given)
    for form, ratio in {"jumprelu": expected, "relu": 1 if given is None else given}.items():
        state, _ = start(form, config=config)
        after, _ = step.step(state, X[0], X[0], config)
        for name, moved in {"b_dec": ratio, "encoder": 1}.items():
            change = jnp.abs(getattr(after.module, name) - getattr(state.module, name))
            np.testing.assert_allclose(jnp.max(change), 1e-3 * moved, rtol=1e-2)


def test_a_sweep_in_turn_replaces_members_where_they_are():
    states, config = zip(*(start(seed=seed, d_sae=4096) for seed in range(8)), strict=True)
    stack = train.stack(states)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
    compiled = loop._run.lower(loop.Batches(config[0], X, None, None, 1), stack).compile().compiled
    assert compiled.memory_analysis().temp_size_in_bytes < held  # a second copy of the stack would be as much


@pytest.mark.parametrize("form", K_FORMS)
def test_sparse_path_is_the_dense_loss(form):
    state, config = start(form)
    candidates = state.module.k if form == "topk" else 16
    chosen = state.module.select(X[0], state.hyper, jnp.dtype("float32"), candidates)

    def sparse(module):
        return module.sparse_loss(X[0], X[0], chosen).loss

    def dense(module):
        return module.loss(X[0], X[0], state.hyper, jnp.dtype("float32")).loss

    a, b = (jax.jit(jax.value_and_grad(loss))(state.module) for loss in (sparse, dense))
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    assert config.steps == 100


def test_a_sweep_equals_separate_runs():
    config = train.TrainConfig(steps=100, eps=1e-2)  # Adam would turn the rounding of a zero gradient into a whole step
    states = []
    for seed, rate, k in ((0, 1e-2, 2.0), (1, 1e-3, 3.0), (2, 3e-3, 1.0)):
        state, _ = start(seed=seed, k=3, config=config)
        hyper = train.hyper(state.module, config, k=k)
        hyper = Hyper(jnp.float32(rate), hyper.sparsity, hyper.target_l0, hyper.k, hyper.aux, hyper.bandwidth)
        states.append(train.TrainState(**{**vars(state), "hyper": hyper}))
    for at_once in (1, 3):
        swept, _ = train.run(train.stack(states), X, config, at_once=at_once)
        for state, found in zip(states, train.unstack(swept), strict=True):
            alone, _ = train.run(jax.tree.map(jnp.copy, state), X, config)
            assert float(jnp.abs(alone.module.encoder - state.module.encoder).max()) > 1e-4
            if at_once == 1:
                same(alone, found)
            for left, right in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True):
                np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_members_read_and_write_the_sites_they_are_told():
    """A sweep over places, transcoders too, equals separate runs on those places' rows."""
    config = train.TrainConfig(steps=100)
    places = jax.random.normal(jax.random.key(7), (6, 3, 32, 8))
    sites = jnp.asarray([[0, 2], [2, 1]], jnp.int32)
    module = sae.BatchTopK.init(d_model=8, d_sae=16, k=3, key=jax.random.key(0), d_out=8)
    states = [train.init(module, config, places[0, a], places[0, b]) for a, b in sites.tolist()]
    swept, _ = train.run(train.stack(states), places, config, at_once=1, sites=sites)
    for state, found, (a, b) in zip(states, train.unstack(swept), sites.tolist(), strict=True):
        alone, _ = train.run(jax.tree.map(jnp.copy, state), places[:, a], config, places[:, b])
        same(alone, found)
        one, _ = train.run(jax.tree.map(jnp.copy, state), places, config, sites=jnp.asarray([a, b], jnp.int32))
        same(alone, one)
    with pytest.raises(InputError, match="sites: found"):
        train.run(states[0], places, config, sites=sites)


def test_nan_stops_names_the_step_and_keeps_the_last_good_state():
    state, config = start()
    good, _ = train.run(jax.tree.map(jnp.copy, state), X[:3], config)
    bad = X.at[3, 0, 0].set(jnp.nan)
    with pytest.raises(train.NotFinite, match="step 3") as caught:
        list(train.fit(state, [bad], config))
    same(caught.value.state.module, good.module)
    same(caught.value.state.optimizer, good.optimizer)


@pytest.mark.parametrize("form", ["topk", "batchtopk"])
def test_members_of_a_vmap_share_one_path_and_lose_nothing(form):
    """A path of its own for each member would have all of them computed for all."""
    states = [start(form, seed=seed, eps=1e-2, dead_after=10)[0] for seed in range(2)]
    config = start(form, eps=1e-2, dead_after=10)[1]
    states[1] = train.TrainState(
        **{**vars(states[1]), "since_fired": jnp.full(16, 50, jnp.int32)}
    )  # only these are dead

    def one(state):
        return step.step(state, X[0], X[0], config)[0]

    stacked = train.stack(states)
    made, _, _ = eqx.filter_make_jaxpr(eqx.filter_vmap(one))(stacked)
    assert "cond[" in str(made)
    for alone, together in zip(
        map(one, states), train.unstack(eqx.filter_jit(eqx.filter_vmap(one))(stacked)), strict=True
    ):
        for left, right in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_nan_in_a_sweep_names_its_members_and_spares_the_others():
    (first, config), (second, _), (third, _) = (start(seed=seed) for seed in range(3))
    broken = [eqx.tree_at(lambda s: s.module.b_enc, state, replace_fn=lambda b: b.at[0].set(jnp.nan))
              for state in (second, third)]  # fmt: skip
    alone, _ = train.run(jax.tree.map(jnp.copy, first), X, config)
    with pytest.raises(train.NotFinite, match="step 0, member 1 of 2: the loss is not finite;") as caught:
        list(train.fit(train.stack([first, broken[0]]), [X], config))
    assert caught.value.members == (1,)
    same(train.unstack(caught.value.state)[0].module, alone.module)
    broken[1] = train.TrainState(
        **{**vars(third), "hyper": eqx.tree_at(lambda h: h.learning_rate, third.hyper, jnp.nan)}
    )
    with pytest.raises(train.NotFinite, match=r"step 0, member 0 of 2: .* \(1 more later\)") as caught:
        list(train.fit(train.stack([broken[0], broken[1]]), [X], config))
    assert caught.value.members == (0, 1)


@pytest.mark.parametrize("dead", [0, 10**6])
def test_all_dead_and_nothing_dead_stay_finite(dead):
    state, config = start(dead_after=max(1, dead))
    state = train.TrainState(**{**vars(state), "since_fired": jnp.full(16, 5, jnp.int32)})
    state, metrics = train.run(state, X, config)
    assert np.isfinite(np.asarray(metrics.loss)).all()


@pytest.mark.parametrize("form", ONE_SITE)
def test_zero_variance_input_and_batch_smaller_than_k(form):
    config = train.TrainConfig(steps=10)
    extra = {"k": 5} if form in K_FORMS else {}
    if form == "matryoshka":
        extra["widths"] = (3, 6)
    module = sae.FORMS[form].init(d_model=8, d_sae=6, key=jax.random.key(0), **extra)
    state = train.init(module, config, jnp.ones((2, 8)))
    state, metrics = train.run(state, jnp.ones((2, 3, 8)), config)
    assert np.isfinite(np.asarray(metrics.loss)).all()
    assert (np.asarray(metrics.fvu) == 0).all()


def test_live_equals_replay():
    (a, config), (b, _) = start(), start()
    for a, _ in train.fit(a, [X], config):  # noqa: B007, B020
        pass
    for b, _ in train.fit(b, list(X), config):  # noqa: B007, B020
        pass
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_resume_is_bit_for_bit(tmp_path):
    state, config = start("batchtopk")
    store = ShuffleBuffer.init(capacity=192, d_model=8, key=jax.random.key(5)).add(X.reshape(-1, 8))

    def turn(state, store):
        store, batches = store.draw(steps=1, batch=32)
        return train.run(state, batches, config)[0], store

    state, store = turn(state, store)
    checkpoint.save(tmp_path, 1, (state, store), {"row": 32})
    for _ in range(3):
        state, store = turn(state, store)
    like = (start("batchtopk", seed=9)[0], ShuffleBuffer.init(capacity=192, d_model=8, key=jax.random.key(0)))
    (resumed, again), cursor, at = checkpoint.load(tmp_path, like)
    assert (cursor, at) == ({"row": 32}, 1)
    for _ in range(3):
        resumed, again = turn(resumed, again)
    same(state, resumed)
    same(jax.random.key_data(store.key), jax.random.key_data(again.key))
    same(store.rows, again.rows)


def test_transcoder_trains_towards_its_target():
    config = train.TrainConfig(steps=100, learning_rate=1e-2)
    module = sae.TopK.init(d_model=8, d_sae=16, k=3, key=jax.random.key(0), d_out=5)
    y = X @ jax.random.normal(jax.random.key(3), (8, 5))
    with pytest.raises(InputError, match="target"):
        train.init(module, config, X[0])
    state, metrics = train.run(
        train.init(module, config, X[0], y[0]), jnp.concatenate([X] * 10), config, jnp.concatenate([y] * 10)
    )
    assert float(metrics.fvu[-1]) < float(metrics.fvu[0])
    assert train.finish(state)(X[0]).shape == (32, 5)


def test_training_ends_with_its_steps():
    """In the midst of an item, asking for no further one; a resumed state has the steps that are left."""
    state, config = start(config=train.TrainConfig(steps=8))
    asked = []

    def batches():
        for number in range(9):
            asked.append(number)
            yield X[:3]

    taken = [(int(state.step), len(metrics.loss)) for state, metrics in train.fit(state, batches(), config)]
    assert taken == [(3, 3), (6, 3), (8, 2)]
    assert asked == [0, 1, 2]
    state, _ = train.run(start(config=config)[0], X[:6], config)
    with pytest.raises(InputError, match=r"x: found 6 steps, expected at most 2: config\.steps is 8"):
        train.run(state, X, config)
    ((state, _),) = train.fit(state, [X, X], config)
    assert int(state.step) == 8
    assert list(train.fit(state, [X], config)) == []
