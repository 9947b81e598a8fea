"""Dictionaries on a mesh of devices equal those of one device: products, steps, sweeps, buffers, checkpoints."""

import functools
import math
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sae
from sae import ShuffleBuffer, training
from sae.codes import across, products
from sae.errors import InputError
from sae.forms.ksparse import AbstractBatchTopK
from sae.training import checkpoint, loop, sharding
from tolerances import SAME_F32

# Adam would turn the rounding of a zero gradient into a whole step
CONFIG = training.TrainConfig(steps=8, learning_rate=1e-2, eps=1e-2, sparsity=0.01, aux=0.0)


def mesh_of(data: int, model: int) -> Mesh:
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def start(form: str, d_model: int = 4, d_sae: int = 32, seed: int = 0):
    """A state, and three batches of 16 rows."""
    made = sae.FORMS[form]
    sizes = {"k": 2} if "k" in made.details else {}
    sizes |= {"sites": 2} if made.several_sites else {}
    module = made.init(d_model=d_model, d_sae=d_sae, key=jax.random.key(seed), **sizes)
    x = jax.random.normal(jax.random.key(1), (3, 16, *module.reads))
    return training.init(module, CONFIG, x[0]), x


def assert_same(left, right) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **SAME_F32)


# one mesh of 1 and of 2, two of 4, three of 8 devices; each form on one of them
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("relu", (1, 1)), ("gated", (2, 1)), ("jumprelu", (2, 2)), ("matryoshka", (1, 8)), ("crosscoder", (8, 1)),
        ("batchtopk", (2, 2)), ("topk", (2, 4)),
    ],
)  # fmt: skip
def test_every_form_trains_on_a_mesh_as_on_one_device(form, shape, monkeypatch):
    if form == "batchtopk":  # whose sparse path would not pay at this size, nor do those of the others here
        monkeypatch.setattr(AbstractBatchTopK, "sparse_pays", lambda self: True)
    state, x = start(form)
    alone, said = training.run(jax.tree.map(jnp.copy, state), x, CONFIG)
    mesh = mesh_of(*shape)
    found, measured = training.run(training.place(state, mesh), x, CONFIG)
    assert float(jnp.abs(alone.module.encoder - start(form)[0].module.encoder).max()) > 1e-3
    assert_same((found, measured), (alone, said))
    np.testing.assert_array_equal(found.since_fired, alone.since_fired)  # the same latents were chosen
    expected = sharding.shardings(found, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), found, expected)))


def test_every_form_is_covered():
    assert set(sae.FORMS) == {"relu", "gated", "jumprelu", "matryoshka", "crosscoder", "batchtopk", "topk"}


@functools.cache
def compiled_products():
    """Forward and backward of every sparse product, with the codes that `choose` gives."""

    def all_of_them(x, encoder, bias):
        code = products.choose(x, encoder, bias, 4)
        columns = code.indices.reshape(-1)
        rows = jnp.repeat(jnp.arange(len(x), dtype=jnp.int32), 4)

        def total(encoder, x):
            values = products.row_dots(code.indices, x, encoder)
            written = products.weighted_rows(code.indices, values, encoder)
            pairs = products.pair_dots(rows, columns, x, encoder)
            return jnp.mean(jnp.sin(written) + products.pair_rows(rows, columns, pairs, encoder, len(x)))

        return code, jax.value_and_grad(total, (0, 1))(encoder, x)

    return jax.jit(all_of_them)


@settings(max_examples=8)
@given(st.sampled_from([(2, 4), (3, 2)]), st.integers(0, 2**16), st.booleans())
def test_sparse_products_on_a_mesh_are_those_of_one_device(shape, seed, tied):
    """3 does not divide the rows: they lie on all devices then."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x, encoder = jax.random.normal(keys[0], (16, 4)), jax.random.normal(keys[1], (24, 4)) / 2
    if tied:  # whole numbers are exact in any order, and latents that are equal on several devices tie
        x, encoder = jnp.round(x), jnp.concatenate([jnp.round(2 * encoder[:12])] * 2)
    given_ = x, encoder, jnp.zeros(24)
    code, rest = compiled_products()(*given_)
    with jax.set_mesh(mesh_of(*shape)):
        found, other = compiled_products()(*given_)
    np.testing.assert_array_equal(found.indices, code.indices)
    assert_same((found.values, other), (code.values, rest))


def test_a_sweep_on_a_mesh_is_that_of_one_device():
    states = [start("jumprelu", seed=seed)[0] for seed in range(2)]
    x = start("jumprelu")[1][:, :15]  # which 2 does not divide: every device works on all rows
    alone, _ = training.run(training.stack(states), x, CONFIG, at_once=1)
    mesh = mesh_of(2, 2)
    for at_once in (1, 2):
        found, _ = training.run(training.place(training.stack(states), mesh), x, CONFIG, at_once=at_once)
        assert found.module.encoder.sharding.shard_shape(found.module.encoder.shape) == (2, 16, 4)
        assert_same(found, alone)


def test_a_donated_state_is_written_in_place_on_a_mesh():
    """And no device ever holds another's latents: tables are not gathered."""
    state, x = start("topk", d_model=64, d_sae=1024)
    mesh = mesh_of(2, 2)
    state = training.place(state, mesh)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert held < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    x = jax.device_put(x, across.by_rows(mesh, 16, 1))
    with jax.set_mesh(mesh):
        compiled = loop._run.lower(loop.Batches(CONFIG, x, None, None, None, mesh), state).compile().compiled
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 1.5 * held  # gradients and unit rows; a second copy would be as much again
    gathered = [line.split(" all-gather(")[0] for line in compiled.as_text().splitlines() if " all-gather(" in line]
    shapes = re.findall(r"\[([\d,]+)\]", " ".join(gathered))
    assert set(shapes) == {"8,4"}  # the 2 best of each row from both devices: their values, and which they are


def test_a_buffer_on_a_mesh_gives_the_rows_of_one_device():
    """They stay on the devices, and lie where a step wants them."""
    rows = jax.random.normal(jax.random.key(1), (40, 2, 3)).astype(jnp.bfloat16)
    keep = jnp.arange(40) % 5 > 0
    sizes = {"capacity": 48, "sites": 2, "d_model": 3, "dtype": jnp.bfloat16}
    mesh = mesh_of(4, 2)
    spread = ShuffleBuffer.init(**sizes, key=jax.random.key(0), mesh=mesh)
    alone = ShuffleBuffer.init(**sizes, key=jax.random.key(0))
    where = jax.tree.map(lambda leaf: leaf.sharding, spread)
    made = jax.device_put(rows, across.by_rows(mesh, 40))
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        spread = spread.add(made, keep).add(made[:20])
    alone = alone.add(rows, keep).add(rows[:20])
    spread, drawn = spread.draw(steps=2, batch=8)
    alone, expected = alone.draw(steps=2, batch=8)
    np.testing.assert_array_equal(drawn, expected)
    assert drawn.sharding.is_equivalent_to(across.by_rows(mesh, 8, 1), 4)
    assert jax.tree.map(lambda leaf: leaf.sharding, spread) == where
    assert spread.bits.sharding.shard_shape(spread.bits.shape)[0] == 12
    np.testing.assert_array_equal(spread.rows, alone.rows)


@settings(max_examples=6)
@given(
    st.sampled_from([(6,), (5, 4), (2, 3, 4), (0, 2)]), st.permutations([None, "data", "model"]), st.integers(4, 100)
)
def test_a_checkpoint_does_not_tell_where_a_state_lay(tmp_path_factory, shape, axes, at_once):
    """Byte for byte; and it comes back on any mesh."""
    mesh = mesh_of(2, 2)
    array = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    spec = [axis if size % 2 == 0 else None for axis, size in zip(axes, shape, strict=False)]
    spread = jax.device_put(array, NamedSharding(mesh, P(*spec)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "AT_ONCE", at_once)
        home = tmp_path_factory.mktemp("checkpoints")
        checkpoint.save(home, 1, {"leaf": spread, "key": jax.random.key(3)})
    written = (home / "00000001" / "state.safetensors").read_bytes()
    key = np.asarray(jax.random.key_data(jax.random.key(3)))
    assert written == safetensors.numpy.save({"['leaf']": np.asarray(array), "['key']": key})
    other = jax.device_put(array * 0, NamedSharding(mesh_of(1, 2), P(None, *spec[1:])))
    found = checkpoint.load(home, {"leaf": other, "key": jax.random.key(0)})[0]["leaf"]
    assert found.sharding == other.sharding
    np.testing.assert_array_equal(found, array)


def test_a_run_goes_on_on_another_mesh(tmp_path):
    state, x = start("relu")
    first, _ = training.run(training.place(state, mesh_of(4, 2)), x[:1], CONFIG)
    checkpoint.save(tmp_path, 1, first)
    other, _, _ = checkpoint.load(tmp_path, training.place(start("relu")[0], mesh_of(1, 8)))
    first, _ = training.run(first, x[1:2], CONFIG)
    other, _ = training.run(other, x[1:2], CONFIG)
    assert other.module.encoder.sharding.shard_shape((32, 4)) == (4, 4)
    assert_same(other, first)


def test_what_cannot_be_placed_is_refused():
    state, _ = start("relu")
    devices = np.array(jax.devices()[:2])
    auto, explicit = (AxisType.Auto,) * 2, (AxisType.Explicit,) * 2
    with pytest.raises(InputError, match=r"axes \('rows', 'model'\), expected \('data', 'model'\)"):
        training.place(state, Mesh(devices.reshape(2, 1), ("rows", "model"), axis_types=auto))
    with pytest.raises(InputError, match=r"Explicit.*expected AxisType\.Auto"):
        training.place(state, Mesh(devices.reshape(2, 1), ("data", "model"), axis_types=explicit))


def test_a_leaf_without_a_rule_is_refused(monkeypatch):
    state, _ = start("relu")
    monkeypatch.delitem(sharding.RULES, "since_fired")
    with pytest.raises(InputError, match="since_fired: found 0 rules"):
        training.place(state, mesh_of(2, 1))
