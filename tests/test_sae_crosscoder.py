"""One code for several sites: the laws of every form, the features of two sites, and one file that knows it."""

import functools
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import sae
import tolerances
from sae import training
from sae.data import synthetic
from sae.data.buffer import ShuffleBuffer
from sae.evaluation import metrics
from sae.training import step

ROOT = Path(__file__).parent.parent
X = jax.random.normal(jax.random.key(1), (6, 32, 2, 8)) * jnp.array([1.0, 5.0])[None, None, :, None] + 0.5


def make(sites: int = 2, k: int = 3, seed: int = 0, threshold: float | None = None) -> sae.Crosscoder:
    module = sae.Crosscoder.init(sites=sites, d_model=8, d_sae=16, k=k, key=jax.random.key(seed))
    bias = jax.random.normal(jax.random.key(seed + 1), (16,)) / 10
    module = eqx.tree_at(lambda m: m.b_enc, module, bias)
    return module if threshold is None else eqx.tree_at(lambda m: m.threshold, module, jnp.float32(threshold))


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_sparse_and_dense_agree_and_fold_keeps_the_function(threshold):
    module, x = make(threshold=threshold), X[:2]
    z = module.encode(x)
    assert z.shape == (2, 32, 16)
    assert float(z.min()) >= 0
    assert module(x).shape == x.shape
    np.testing.assert_allclose(module.decode(module.encode_sparse(x, 16)), module.decode(z), atol=1e-5)
    scale, mean = jnp.array([2.0, 0.5]), jax.random.normal(jax.random.key(5), (2, 8))
    folded = module.fold(scale, mean)
    inner = scale[None, None, :, None] * (x - mean[None, None])
    np.testing.assert_allclose(folded.encode(x), module.encode(inner), atol=1e-4)
    np.testing.assert_allclose(
        folded(x), module(inner) / scale[None, None, :, None] + mean[None, None], rtol=1e-4, atol=1e-4
    )


def test_lengths_are_summed_over_sites_and_move_freely():
    module, x = make(threshold=0.2), X[0]
    lengths = jnp.exp(jax.random.normal(jax.random.key(2), (16,)))
    longer = module.lengthened(lengths)
    np.testing.assert_allclose(longer.decoder * lengths[:, None, None], module.decoder, rtol=1e-5)
    norms = jnp.linalg.norm(longer.unit_rows().decoder, axis=-1)
    np.testing.assert_allclose(jnp.sum(norms, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(longer.unit_rows()(x), module(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(longer.site_shares(), module.site_shares(), rtol=1e-4)
    np.testing.assert_allclose(module.site_shares().sum(-1), 1, rtol=1e-5)


def test_one_site_is_a_batchtopk_that_does_not_subtract():
    cross = make(sites=1, threshold=0.1)
    plain = sae.BatchTopK.init(d_model=8, d_sae=16, k=3, key=jax.random.key(0), d_out=8)
    fields = lambda m: (m.encoder, m.b_enc, m.decoder, m.b_dec, m.threshold)  # noqa: E731
    own = cross.encoder[:, 0], cross.b_enc, cross.decoder[:, 0], cross.b_dec[0], cross.threshold
    plain = eqx.tree_at(fields, plain, own)
    x = X[0, :, :1]
    np.testing.assert_allclose(cross.encode(x), plain.encode(x[:, 0]), atol=1e-5)
    np.testing.assert_allclose(cross(x)[:, 0], plain(x[:, 0]), atol=1e-5)


def test_sparse_path_is_the_dense_loss():
    module = make()
    hyper = training.hyper(module, training.TrainConfig(steps=1))
    chosen = module.select(X[0], hyper, jnp.dtype("float32"), 16)
    losses = (
        lambda m: m.sparse_loss(X[0], X[0], chosen).loss,
        lambda m: m.loss(X[0], X[0], hyper, jnp.dtype("float32")).loss,
    )
    sparse, dense = (jax.jit(jax.value_and_grad(loss))(module) for loss in losses)
    for left, right in zip(jax.tree.leaves(sparse), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_free_rows_of_any_length_mean_the_same():
    config = training.TrainConfig(steps=100, learning_rate=1e-2)
    state = training.init(make(), config, X[0])
    lengths = jnp.exp(jax.random.normal(jax.random.key(4), (16,)))
    other = eqx.tree_at(lambda s: s.module, state, state.module.lengthened(lengths))
    take = eqx.filter_jit(lambda state: step.step(state, X[0], X[0], config))
    (_, one), (_, same) = take(state), take(other)
    for left, right in zip(one, same, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4)
    np.testing.assert_allclose(training.finish(state)(X[0]), training.finish(other)(X[0]), atol=1e-4)


@pytest.mark.parametrize("free", [True, False])
def test_it_learns_and_every_site_weighs_the_same(free):
    config = training.TrainConfig(steps=100, learning_rate=1e-2, free_norm=free)
    state = training.init(make(), config, X.reshape(-1, 2, 8))
    np.testing.assert_allclose(state.scale[0] / state.scale[1], 5, rtol=0.1)
    state, found = training.run(state, jnp.concatenate([X] * 10), config)
    assert float(found.loss[-6:].mean()) < 0.8 * float(found.loss[:6].mean())
    assert abs(float(found.l0[-1]) - 3) < 0.1
    if not free:
        norms = jnp.sum(jnp.linalg.norm(state.module.decoder, axis=-1), axis=-1)
        np.testing.assert_allclose(norms, 1, rtol=1e-5)
    module = training.finish(state)
    rows = X.reshape(-1, 2, 8)
    result = metrics.evaluate(module, [rows], jnp.mean(rows, axis=0))
    flat, made = np.asarray(rows, np.float64).reshape(-1, 16), np.asarray(module(rows), np.float64).reshape(-1, 16)
    expected = np.square(flat - made).sum() / np.square(flat - flat.mean(0)).sum()
    np.testing.assert_allclose(result["fvu"], expected, rtol=1e-3)


def test_members_read_the_sites_they_are_told():
    """Two crosscoders of a sweep, each on two of three sites, equal separate runs on those sites' rows."""
    config = training.TrainConfig(steps=100)
    places = jax.random.normal(jax.random.key(7), (4, 3, 32, 8))
    chosen = [[0, 2], [2, 1]]
    states = [training.init(make(), config, jnp.moveaxis(places[0, jnp.array(c)], 0, 1)) for c in chosen]
    sites = jnp.asarray([[c, c] for c in chosen], jnp.int32)
    swept, _ = training.run(training.stack(states), places, config, at_once=1, sites=sites)
    for state, member, c in zip(states, training.unstack(swept), chosen, strict=True):
        rows = jnp.moveaxis(places[:, jnp.array(c)], 1, 2)
        alone, _ = training.run(jax.tree.map(jnp.copy, state), rows, config)
        jax.tree.map(np.testing.assert_array_equal, alone, member)
    with pytest.raises(sae.InputError, match="sites: found"):
        training.run(states[0], places, config, sites=jnp.zeros((2,), jnp.int32))


def test_a_buffer_of_two_sites_feeds_it():
    rows = ShuffleBuffer.init(capacity=192, d_model=8, sites=2, key=jax.random.key(5)).add(X.reshape(-1, 2, 8))
    rows, drawn = rows.draw(steps=2, batch=32)
    config = training.TrainConfig(steps=2)
    ((state, _),) = training.fit(training.init(make(), config, drawn[0]), [drawn], config)
    assert int(state.step) == 2


# ------------------------------------------------------------ the features of two sites

TRUE = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (2, 32, 16)))[0].swapaxes(1, 2)  # sites features d_model
AT = jnp.array([[1.0, 1.0]] * 8 + [[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)  # features sites: eight shared, four of each


@functools.cache
def two_sites(steps: int, batch: int) -> jax.Array:
    """Two of 16 features in every row; a shared one has a direction of its own at each site."""
    which, size = jax.random.split(jax.random.key(1))
    fires = jnp.argsort(jax.random.uniform(which, (steps, batch, 16)), axis=-1) < 2
    strength = jnp.where(fires, jax.nn.relu(1 + 0.3 * jax.random.normal(size, (steps, batch, 16))), 0.0)
    return jnp.einsum("tbf,fi,ifd->tbid", strength, AT, TRUE)


def test_it_finds_the_features_of_two_sites():
    """MCC as for the other forms, and each latent knows which sites it is of."""
    config = training.TrainConfig(steps=1500, learning_rate=5e-3, decay_steps=500, dead_after=20_000, centre=False)
    x = two_sites(1500, 256)
    module = sae.Crosscoder.init(sites=2, d_model=32, d_sae=32, k=2, key=jax.random.key(2))
    state, _ = training.run(training.init(module, config, x[0]), x, config)
    found = training.finish(state)
    true = jnp.einsum("fi,ifd->fid", AT, TRUE).reshape(16, -1)
    assert synthetic.mcc(found.decoder.reshape(32, -1), true) >= 0.97
    unit = found.decoder.reshape(32, -1) / jnp.linalg.norm(found.decoder.reshape(32, -1), axis=-1, keepdims=True)
    nearest = jnp.argmax(jnp.abs(unit @ true.T), axis=0)  # the latent of each feature
    shares = AT / jnp.sum(AT, axis=-1, keepdims=True)
    np.testing.assert_allclose(found.site_shares()[nearest], shares, atol=0.1)


# ------------------------------------------------------------ on disk


def same(one: sae.AbstractDictionary, other: sae.AbstractDictionary) -> None:
    assert type(one) is type(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(other))


@given(st.integers(1, 3), st.integers(1, 16), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.5]))
def test_it_comes_back_as_it_was_saved(tmp_path_factory, sites, k, seed, threshold):
    directory = tmp_path_factory.mktemp("crosscoder")
    module = make(sites, k, seed, threshold)
    density = np.random.default_rng(seed).random(16, np.float32)
    sae.save(module, directory, {"hook_names": ["a", "b"]}, density=density)
    loaded = sae.load_with_metadata(directory)
    same(loaded.module, module)
    assert loaded.metadata["hook_names"] == ["a", "b"]
    np.testing.assert_allclose(loaded.density, density, **tolerances.CONVERTED)


BROKEN = {
    "a site too few in the decoder": ({"W_dec": np.zeros((16, 1, 8), np.float32)}, "expected [sites, d_model, d_sae]"),
    "a matrix": ({"W_enc": np.zeros((8, 16), np.float32)}, "expected [sites, d_model, d_sae]"),
    "a bias of one site": ({"b_dec": np.zeros(8, np.float32)}, "b_dec: found shape (8,), expected (2, 8)"),
    "infinity": ({"b_dec": np.full((2, 8), np.inf, np.float32)}, "b_dec: found NaN or infinity"),
    "no threshold": ({"threshold": None}, "threshold: missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_refused_in_one_line(tmp_path, name):
    tensors, expected = BROKEN[name]
    sae.save(make(threshold=0.3), tmp_path, {})
    path = tmp_path / "sae_weights.safetensors"
    stored = {key: each for key, each in (safetensors.numpy.load_file(path) | tensors).items() if each is not None}
    safetensors.numpy.save_file(stored, path)
    config = tmp_path / "cfg.json"
    config.write_text(re.sub(r'"weights_digest": "[^"]*"', '"weights_digest": "none"', config.read_text()))
    with pytest.raises(sae.InputError, match=re.escape(expected)) as error:
        sae.load(tmp_path)
    assert "\n" not in str(error.value)


def test_impossible_sizes_are_refused():
    with pytest.raises(sae.InputError, match="sites: found 0"):
        make(sites=0)
    with pytest.raises(sae.InputError, match="k: found 17"):
        make(k=17)
    with pytest.raises(sae.InputError, match="sample: found rows"):
        training.init(make(), training.TrainConfig(steps=1), X[0, :, 0])


def test_its_file_is_the_only_one_that_knows_it():
    """Beside it stand its row among the forms, its row in the formats, and its public name."""
    places = [*(ROOT / "sae").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    knowing = {path.relative_to(ROOT).as_posix() for path in places if "crosscoder" in path.read_text().lower()}
    rows = {"sae/forms/__init__.py", "sae/formats/saelens.py", "sae/__init__.py"}
    assert knowing == {"sae/forms/crosscoder.py"} | rows
