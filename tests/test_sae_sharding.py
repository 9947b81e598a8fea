"""Dictionaries on a mesh of devices equal those of one device: products, steps, sweeps, buffers, checkpoints."""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

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
from ports import free_port, with_devices
from sae import ShuffleBuffer, files, training
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
    sizes |= {"widths": (d_sae // 2, d_sae)} if form == "matryoshka" else {}  # every width lengthens compilation
    module = made.init(d_model=d_model, d_sae=d_sae, key=jax.random.key(seed), **sizes)
    x = jax.random.normal(jax.random.key(1), (3, 16, *module.reads))
    return training.init(module, CONFIG, x[0]), x


def assert_same(left, right) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **SAME_F32)


# relu: test_two_processes; jumprelu: test_a_sweep; topk: test_a_donated_state
@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("gated", (1, 1)),
        ("crosscoder", (2, 1)),
        ("matryoshka", (1, 2)),
        ("batchtopk", (2, 2)),
        ("skip", (2, 2)),
        ("clt", (1, 2)),
    ],
)
def test_a_form_trains_on_a_mesh_as_on_one_device(form, shape, monkeypatch):
    if form == "batchtopk":  # whose sparse path would not pay at this size, nor do those of the others here
        monkeypatch.setattr(AbstractBatchTopK, "sparse_pays", lambda self: True)
    state, x = start(form)
    before = np.asarray(state.module.encoder)
    alone, said = training.run(jax.tree.map(jnp.copy, state), x, CONFIG)
    assert np.abs(alone.module.encoder - before).max() > 1e-3
    mesh = mesh_of(*shape)
    found, measured = training.run(training.place(state, mesh), x, CONFIG)
    assert_same((found, measured), (alone, said))
    np.testing.assert_array_equal(found.since_fired, alone.since_fired)  # the same latents were chosen
    expected = sharding.shardings(found, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), found, expected)))


@functools.cache
def compiled_products():
    """The codes that `choose` gives, encoded and decoded again; gradients are in the steps of topk and batchtopk."""

    def all_of_them(x, encoder, bias):
        code = products.choose(x, encoder, bias, 4)
        values = products.row_dots(code.indices, x, encoder)
        return code, values, products.weighted_rows(code.indices, values, encoder)

    return jax.jit(all_of_them)


@settings(max_examples=8)
@given(st.sampled_from([(2, 4), (3, 2)]), st.integers(0, 2**16), st.booleans())
def test_sparse_products_on_a_mesh_are_those_of_one_device(shape, seed, tied):
    """3 does not divide the rows: they lie on all devices then."""
    keys = jax.random.split(jax.random.key(seed), 2)
    x, encoder = jax.random.normal(keys[0], (16, 4)), jax.random.normal(keys[1], (24, 4)) / 2
    if tied:  # whole numbers are exact in any order, and latents that are equal on several devices tie
        x, encoder = jnp.round(x), jnp.concatenate([jnp.round(2 * encoder[:12])] * 2)
    code, *rest = compiled_products()(x, encoder, jnp.zeros(24))
    with jax.set_mesh(mesh_of(*shape)):
        found, *others = compiled_products()(x, encoder, jnp.zeros(24))
    np.testing.assert_array_equal(found.indices, code.indices)
    assert_same((found.values, others), (code.values, rest))


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
    """And what leaves a device is what the docstring of `sharding` says: no table is gathered."""
    state, x = start("topk", d_model=64, d_sae=1024)
    alone, _ = training.run(jax.tree.map(jnp.copy, state), x, CONFIG)
    mesh = mesh_of(2, 4)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    state = training.place(state, mesh)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert held < 0.3 * whole
    batches = loop.Batches(CONFIG, jax.device_put(x, across.by_rows(mesh, 16, 1)), None, None, None, mesh)
    with jax.set_mesh(mesh):
        compiled = loop._run.lower(batches, state).compile()
        memory = compiled.compiled.memory_analysis()
        found, _ = compiled(batches, state)
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 1.5 * held  # gradients and unit rows; a second copy would be as much again
    program = compiled.compiled.as_text().splitlines()
    gathered = [line.split(" all-gather(")[0] for line in program if " all-gather(" in line]
    assert set(re.findall(r"\[([\d,]+)\]", " ".join(gathered))) == {"8,8"}  # the 2 best of each row, of 4 devices
    assert_same(found, alone)
    np.testing.assert_array_equal(found.since_fired, alone.since_fired)  # the same latents were chosen


def test_a_buffer_on_a_mesh_gives_the_rows_of_one_device(monkeypatch):
    """They stay on the devices, and lie where a step wants them."""
    rows = jax.random.normal(jax.random.key(1), (40, 2, 3)).astype(jnp.bfloat16)
    keep = jnp.arange(40) % 5 > 0
    sizes = {"capacity": 48, "sites": 2, "d_model": 3, "dtype": jnp.bfloat16}
    alone = ShuffleBuffer.init(**sizes, key=jax.random.key(0)).add(rows, keep).add(rows[:20])
    alone, expected = alone.draw(steps=2, batch=8)
    mesh = mesh_of(4, 2)
    spread = ShuffleBuffer.init(**sizes, key=jax.random.key(0), mesh=mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, spread)
    made, first = (jax.device_put(part, across.by_rows(mesh, 20)) for part in (rows, rows[:20]))
    with monkeypatch.context() as patch:
        patch.setattr(type(made), "_value", property(lambda array: pytest.fail("an array went to the host")))
        spread = spread.add(made, keep).add(first)
    spread, drawn = spread.draw(steps=2, batch=8)
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


def test_two_processes_train_and_save_a_state_that_one_goes_on_with_on_another_mesh(tmp_path):
    """Each writes what its devices hold, so no file has a whole table. They went on from a checkpoint themselves."""
    port = str(free_port())
    environment = os.environ | {"XLA_FLAGS": with_devices(2)}
    command = [sys.executable, str(Path(__file__).with_name("host_sae.py")), port]
    both = [subprocess.Popen([*command, str(n), "2", str(tmp_path)], env=environment) for n in range(2)]
    try:
        assert [process.wait(timeout=240) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    whole = (32, 4)
    for path in (tmp_path / "00000002").glob("*.safetensors"):
        assert all(shape != whole for _, shape in files.read_header(path).values())
    alone, x = start("relu")
    mesh = mesh_of(1, 4)
    found, _, step = checkpoint.load(tmp_path, training.place(alone, mesh))
    for one in x[:, None]:
        alone, _ = training.run(alone, one, CONFIG)
    found, _ = training.run(found, x[step:], CONFIG)
    assert sharding.mesh_of(found) == mesh
    assert_same(found, alone)


def test_what_cannot_be_placed_is_refused():
    state, _ = start("relu")
    devices = np.array(jax.devices()[:2])
    auto, explicit = (AxisType.Auto,) * 2, (AxisType.Explicit,) * 2
    with pytest.raises(InputError, match=r"axes \('rows', 'model'\), expected \('data', 'model'\)"):
        training.place(state, Mesh(devices.reshape(2, 1), ("rows", "model"), axis_types=auto))
    with pytest.raises(InputError, match=r"Explicit.*expected AxisType\.Auto"):
        training.place(state, Mesh(devices.reshape(2, 1), ("data", "model"), axis_types=explicit))


def test_what_is_not_divided_is_said(caplog):
    state, _ = start("relu", d_sae=34)
    placed = training.place(state, mesh_of(1, 4))
    assert "mesh: 34 latents are no multiple of model=4: every device holds all of them" in caplog.text
    assert placed.module.encoder.sharding.is_fully_replicated


def test_a_leaf_without_a_rule_is_refused(monkeypatch):
    state, _ = start("relu")
    monkeypatch.delitem(sharding.RULES, "since_fired")
    with pytest.raises(InputError, match="since_fired: found 0 rules"):
        training.place(state, mesh_of(2, 1))
