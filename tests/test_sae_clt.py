"""Transcoders with a skip and across layers: the laws of every form, and what they become where the addition is nothing."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from sae import training
from sae.data import synthetic
from sae.evaluation import metrics
from test_sae_transcoders import written

F32 = jnp.dtype("float32")
encode = eqx.filter_jit(lambda module, x: module.encode(x))
call = eqx.filter_jit(lambda module, x: module(x))
fold = eqx.filter_jit(lambda module, *by: module.fold(*by))
X, Y = (
    jax.random.normal(jax.random.key(1), (2, 6, 32, 3, 8)) * jnp.array([1.0, 5.0, 2.0])[None, None, None, :, None] + 0.5
)


@functools.cache
def make(sites: int = 3, threshold: float | None = None) -> sae.CLT:
    module = sae.CLT.init(sites=sites, d_model=8, d_sae=6 * sites, k=3, key=jax.random.key(0))
    bias = jnp.asarray(np.random.default_rng(0).normal(size=6 * sites) / 10, jnp.float32)
    module = eqx.tree_at(lambda m: m.b_enc, module, bias)
    return module if threshold is None else eqx.tree_at(lambda m: m.threshold, module, jnp.float32(threshold))


def skipping(seed: int = 0, threshold: float = 0.2, zero: bool = False) -> sae.SkipTranscoder:
    module = sae.SkipTranscoder.init(d_model=8, d_sae=16, d_out=8, k=3, key=jax.random.key(seed))
    skip = jax.random.normal(jax.random.key(seed + 1), (8, 8)) * (0.0 if zero else 0.3)
    return dataclasses.replace(module, skip=skip, threshold=jnp.float32(threshold))


# ------------------------------------------------------------ across layers


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_sparse_and_dense_agree_and_fold_keeps_the_function(threshold):
    module, x = make(threshold=threshold), X[0]
    z = encode(module, x)
    assert z.shape == (32, 18)
    assert module.reads == module.writes == (3, 8)
    sparse = eqx.filter_jit(lambda module, x: module.decode(module.encode_sparse(x, 18)))(module, x)
    np.testing.assert_allclose(sparse, call(module, x), atol=1e-5)
    scale, scale_out = jnp.array([2.0, 0.5, 1.0]), jnp.array([1.0, 3.0, 0.5])
    mean, mean_out = jax.random.normal(jax.random.key(5), (2, 3, 8))
    folded = fold(module, scale, mean, scale_out, mean_out)
    inner = scale[None, :, None] * (x - mean[None])
    np.testing.assert_allclose(encode(folded, x), encode(module, inner), atol=1e-4)
    expected = call(module, inner) / scale_out[None, :, None] + mean_out[None]
    np.testing.assert_allclose(call(folded, x), expected, rtol=1e-4, atol=1e-4)


def test_a_latent_reads_its_own_layer_and_writes_no_earlier_one():
    module, x = make(threshold=0.1), X[0]
    for layer in range(3):
        other = jnp.asarray(np.asarray(x) + np.eye(3, dtype=np.float32)[layer][None, :, None])
        changed = np.flatnonzero(np.any(np.asarray(encode(module, other)) != np.asarray(encode(module, x)), axis=0))
        assert set(changed // 6) == {layer}
        moved = np.any(np.asarray(call(module, other)) != np.asarray(call(module, x)), axis=(0, 2))
        np.testing.assert_array_equal(moved, np.arange(3) >= layer)
    lengths = np.linalg.norm(np.asarray(module.rows()), axis=-1).sum(-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_one_layer_is_a_batchtopk_transcoder():
    """Its latents, its loss, what it learns in some steps, and its rows in a set."""
    across = make(sites=1)
    names = ("encoder", "b_enc", "threshold", "k")
    own = {name: getattr(across, name) for name in names} | {"decoder": across.decoder[:, 0], "b_dec": across.b_dec[0]}
    alone = sae.BatchTopK(**own, apply_b_dec_to_input=False)
    config = training.TrainConfig(steps=6, learning_rate=1e-2)
    x, y = X[:, :, :1], Y[:, :, :1]
    ends = []
    for module, read, write in ((across, x, y), (alone, x[:, :, 0], y[:, :, 0])):
        state, found = training.run(training.init(module, config, read[0], write[0]), read, config, write)
        ends.append((training.finish(state), found))
    (one, said), (other, says) = ends
    np.testing.assert_allclose(said.loss, says.loss, rtol=1e-4)
    rows = np.asarray(x[0]).swapaxes(0, 1)
    np.testing.assert_allclose(
        written(sae.Transcoders.of(one), rows), written(sae.Transcoders.of([other]), rows), rtol=1e-3, atol=1e-3
    )


def test_the_sparse_path_is_the_dense_loss():
    module = make()
    hyper = training.hyper(module, training.TrainConfig(steps=1))
    chosen = module.select(X[0], hyper, F32, 18)
    losses = (
        lambda m: m.sparse_loss(X[0], Y[0], chosen).loss,
        lambda m: m.loss(X[0], Y[0], hyper, F32).loss,
    )
    sparse, dense = (jax.jit(jax.value_and_grad(loss))(module) for loss in losses)
    for left, right in zip(jax.tree.leaves(sparse), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
    assert not np.asarray(dense[1].decoder)[12:, :2].any()


def test_a_set_says_by_rows_what_it_computes(tmp_path):
    module = make(threshold=0.2)
    found = sae.Transcoders.of(module)
    assert (found.n_layers, found.d_sae, found.crosses) == (3, 6, True)
    x = np.asarray(X[0]).swapaxes(0, 1)
    np.testing.assert_allclose(written(found, x), np.asarray(call(module, X[0])).swapaxes(0, 1), atol=1e-4)
    sites = ["+".join(f"blocks.{layer}.hook_{kind}" for layer in range(3)) for kind in ("resid_mid", "mlp_out")]
    sae.save(module, tmp_path / "own", {"hook_name": sites[0], "hook_name_out": sites[1], "model_name": "m"})
    sae.save_transcoders(sae.load_transcoders(tmp_path / "own"), tmp_path / "set")
    again = sae.load_transcoders(tmp_path / "set")
    assert again.metadata == {"model_name": "m"}
    np.testing.assert_array_equal(written(again, x), written(found, x))
    loaded = sae.load(tmp_path / "own")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(loaded), jax.tree.leaves(module))
    sae.save(module, tmp_path / "other", {"hook_name": sites[0], "hook_name_out": "blocks.0.hook_mlp_out"})
    with pytest.raises(sae.InputError, match=r"hook_name_out: found .* expected a site of each block"):
        sae.load_transcoders(tmp_path / "other")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"sites": 3, "d_sae": 16}, "d_sae: found 16, expected a multiple of the 3 layers"),
        ({"sites": 0, "d_sae": 16}, "d_sae: found 16"),
        ({"sites": 2, "d_sae": 2, "k": 3}, "k: found 3"),
    ],
)
def test_impossible_sizes_are_refused(sizes, said):
    with pytest.raises(sae.InputError, match=said):
        sae.CLT.init(**{"d_model": 4, "k": 1, "key": jax.random.key(0), **sizes})


def test_it_finds_features_that_go_on_across_layers():
    """Features of two layers, each read in one and written there and later: the latents' rows are those of the features."""
    keys = jax.random.split(jax.random.key(0), 3)
    read = jnp.linalg.qr(jax.random.normal(keys[0], (2, 16, 16)))[0][:, :6]  # layers features d_model
    write = jnp.linalg.qr(jax.random.normal(keys[1], (2, 16, 16)))[0]
    rows = jnp.zeros((12, 2, 16)).at[:6, 0].set(write[0, :6]).at[:6, 1].set(write[0, 6:12]).at[6:, 1].set(write[1, :6])
    fires = jnp.argsort(jax.random.uniform(keys[2], (500, 128, 12)), axis=-1) < 2
    strength = jnp.where(fires, jax.nn.relu(1 + 0.3 * jax.random.normal(keys[1], fires.shape)), 0.0)
    x = jnp.einsum("tblf,lfd->tbld", strength.reshape(500, 128, 2, 6), read)
    y = jnp.einsum("tbf,fld->tbld", strength, rows)
    config = training.TrainConfig(steps=500, learning_rate=1e-2, decay_steps=200, dead_after=10_000, centre=False)
    module = sae.CLT.init(sites=2, d_model=16, d_sae=24, k=2, key=jax.random.key(2))
    state, _ = training.run(training.init(module, config, x[0], y[0]), x, config, y)
    found = training.finish(state)
    assert synthetic.mcc(found.rows().reshape(24, -1), rows.reshape(12, -1)) >= 0.95
    assert metrics.evaluate(found, [(x[0], y[0])], jnp.mean(y[0], axis=0))["fvu"] < 0.05


# ------------------------------------------------------------ with a skip


def test_a_skip_of_zero_is_none():
    module, x = skipping(zero=True), X[0, :, 0]
    np.testing.assert_array_equal(call(module, x), call(module.latents(), x))
    hyper = training.hyper(module, training.TrainConfig(steps=1))
    loss = eqx.filter_jit(lambda m: m.loss(x, Y[0, :, 0], hyper, F32).loss)
    losses = [loss(each) for each in (module, module.latents())]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_a_skip_is_kept_by_folding_and_in_a_set(tmp_path):
    module, x = skipping(), X[0, :, 1]
    np.testing.assert_allclose(call(module, x), call(module.latents(), x) + x @ module.skip.T, atol=1e-5)
    mean, mean_out = jax.random.normal(jax.random.key(5), (2, 8))
    folded = fold(module, jnp.float32(0.5), mean, jnp.float32(3.0), mean_out)
    inner = 0.5 * (x - mean[None])
    np.testing.assert_allclose(call(folded, x), call(module, inner) / 3 + mean_out[None], atol=1e-4)
    found = sae.Transcoders.of([folded, folded])
    rows = np.stack([x, x])
    np.testing.assert_allclose(written(found, rows)[0], call(folded, x), atol=1e-4)
    sae.save_transcoders(found, tmp_path)
    np.testing.assert_array_equal(written(sae.load_transcoders(tmp_path), rows), written(found, rows))


def test_a_skip_learns_what_is_linear():
    """The target is linear but for one latent's part: the skip takes the matrix, the latents the rest."""
    keys = jax.random.split(jax.random.key(3), 3)
    matrix, direction = jax.random.normal(keys[0], (8, 8)), jax.random.normal(keys[1], (8,))
    x = jax.random.normal(keys[2], (400, 64, 8))
    y = x @ matrix.T + 3 * jax.nn.relu(x[..., :1] - 1) * direction[None, None]
    config = training.TrainConfig(steps=400, learning_rate=2e-2, decay_steps=200)
    module = sae.SkipTranscoder.init(d_model=8, d_sae=16, d_out=8, k=1, key=jax.random.key(0))
    state, _ = training.run(training.init(module, config, x[0], y[0]), x, config, y)
    found = training.finish(state)
    mean = jnp.mean(y[0], axis=0)
    whole = metrics.evaluate(found, [(x[0], y[0])], mean)["fvu"]
    assert whole < 0.02
    assert metrics.evaluate(found.latents(), [(x[0], y[0])], mean)["fvu"] > 10 * whole
