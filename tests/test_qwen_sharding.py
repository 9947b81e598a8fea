"""Meshes in words, rules that are data, and weights that each device reads for itself."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, Mesh

import qwen_eqx
import strategies
import tiny
from qwen_eqx import InputError, QwenConfig, sharding
from qwen_eqx.weights import hf
from qwen_lab import meshes

CONFIG = tiny.CONFIGS["qwen2"]


@pytest.mark.parametrize(
    ("asked", "shape", "said"),
    [
        ("auto", (8, 1), ""),
        ("data=4,model=2", (4, 2), ""),
        (" model = 2 , data = 4 ", (4, 2), ""),
        ("data=8", (8, 1), ""),
        ("model=2", (4, 2), "data was filled up to the 8 devices"),
        ("model=3", (2, 3), "takes 6 of the 8 devices; the others stay idle"),
        ("data=1", (1, 1), "takes 1 of the 8 devices; the others stay idle"),
    ],
)
def test_a_mesh_in_words(asked: str, shape: tuple[int, int], said: str, caplog: pytest.LogCaptureFixture):
    mesh = qwen_eqx.make_mesh(asked)
    assert tuple(mesh.shape.items()) == (("data", shape[0]), ("model", shape[1]))
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert [record.message for record in caplog.records] == (
        [f"mesh data={shape[0]},model={shape[1]}: {said}"] if said else []
    )


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_mesh_has_the_shape_asked_for_or_is_refused_with_one_that_there_is(data: int, model: int):
    asked = f"data={data},model={model}"
    if data * model > 8:
        with pytest.raises(InputError) as raised:
            qwen_eqx.make_mesh(asked)
        asked = str(raised.value).rpartition("such as ")[2]
    mesh = qwen_eqx.make_mesh(asked)
    assert sharding.describe(*mesh.devices.shape) == asked
    assert len(set(mesh.devices.flat)) == mesh.size


def test_a_mesh_of_the_users_keeps_its_devices():
    devices = np.array(jax.devices()).reshape(2, 4)
    for mesh in (Mesh(devices, ("model", "data")), Mesh(devices.T, ("data", "model"))):
        assert (qwen_eqx.make_mesh(mesh).devices == devices.T).all()
    assert qwen_eqx.make_mesh(Mesh(devices.reshape(-1), ("model",))).devices.shape == (1, 8)
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    assert qwen_eqx.make_mesh(explicit).axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("", "mesh: found '', expected 'auto', or sizes of at least 1 such as 'data=4,model=2'"),
        ("data=0", "mesh: found 'data=0', expected"),
        ("data=2,data=4", "mesh: found 'data=2,data=4', expected"),
        ("data=2;model=4", "mesh: found 'data=2;model=4', expected"),
        ("rows=2", "mesh: found 'rows=2', expected"),
        ("data=-1", "mesh: found 'data=-1', expected"),
        (
            "data=4,model=4",
            "mesh: found 'data=4,model=4', which takes 16 devices, expected at most the 8 there are, such as data=2,model=4",
        ),
        ("model=16", "which takes 16 devices, expected at most the 8 there are, such as data=1,model=8"),
    ],
)
def test_words_that_are_no_mesh(asked: str, said: str):
    with pytest.raises(InputError) as raised:
        qwen_eqx.make_mesh(asked)
    assert said in str(raised.value)


def test_axes_that_are_not_ours():
    with pytest.raises(InputError, match=r"found axes \('data', 'expert'\), expected 'data', 'model' or both"):
        qwen_eqx.make_mesh(jax.make_mesh((4, 2), ("data", "expert")))


# ---------------------------------------------------------------- rules


@given(strategies.configs(), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_every_device_holds_its_share_and_says_what_it_holds_whole(
    config: QwenConfig, data: int, model: int, full: bool
):
    mesh, skeleton = AbstractMesh((data, model), sharding.AXES), hf.skeleton(config, jnp.dtype("float32"))
    over = sharding.FULLY_SHARDED if full else sharding.TENSOR
    sizes = {count: mesh.shape[axis] for count, axis in over.items() if getattr(config, count) % mesh.shape[axis] == 0}
    whole = {line.partition("=")[0] for line in sharding.not_split(config, mesh, over)}
    assert whole == set(over) - set(sizes)
    expected = 0
    for path in hf.name_table(skeleton).values():
        leaf = hf._at(skeleton, path)
        kind = path.rpartition(".")[0].rpartition(".")[2]
        counts = {"q": ["kv_heads", "d_model"], "k": ["kv_heads", "d_model"], "v": ["kv_heads", "d_model"]}
        counts |= {"o": ["d_model", "kv_heads"], "gate": ["d_ff", "d_model"], "up": ["d_ff", "d_model"]}
        counts |= {"down": ["d_model", "d_ff"], "embed": ["vocab", "d_model"], "head": ["vocab", "d_model"]}
        counts |= {"q_norm": [], "k_norm": []}
        of_leaf = counts.get(kind, ["d_model"])[: leaf.ndim]
        expected += leaf.size * 4 // math.prod(sizes.get(count, 1) for count in of_leaf)
    assert sharding.bytes_per_device(skeleton, mesh, over) == expected


def test_a_rule_matches_something_and_nothing_else_does():
    skeleton, mesh = hf.skeleton(CONFIG, jnp.dtype("float32")), AbstractMesh((1, 2), sharding.AXES)
    rules = {**sharding.RULES, r"blocks\.0\..*": ("heads",)}
    with pytest.raises(InputError, match=r"rules: found .* and .* for blocks\.0\..*, expected one rule"):
        sharding.shardings(skeleton, mesh, rules=rules)
    with pytest.raises(InputError, match=r"rules: found 'router', which match no parameter"):
        sharding.shardings(skeleton, mesh, rules={**sharding.RULES, "router": ("d_ff",)})


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    qwen_eqx.save_pretrained(tiny.model("qwen2"), None, directory, max_shard_bytes=9_000)
    return directory


def test_each_part_is_read_once_and_no_tensor_whole(saved: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    finite = hf._not_finite
    monkeypatch.setattr(hf, "_not_finite", lambda array: (read.append(array.size), finite(array))[1])
    mesh = qwen_eqx.make_mesh("data=4,model=2")
    model = hf.load_model(saved, dtype=jnp.float32, mesh=mesh)
    assert sharding.mesh_of(model) == mesh
    assert sum(read) == CONFIG.parameters
    split = [leaf for leaf in jax.tree.leaves(model) if not leaf.sharding.is_fully_replicated]
    assert max(read) == max(max(leaf.size // 2 for leaf in split), 97 * 16)  # 97 tokens: not split, and said so
    for found, expected in zip(jax.tree.leaves(model), jax.tree.leaves(tiny.model("qwen2")), strict=True):
        np.testing.assert_array_equal(found, expected)
    placed = sharding.shard(tiny.model("qwen2"), mesh)
    assert [leaf.sharding for leaf in jax.tree.leaves(placed)] == [leaf.sharding for leaf in jax.tree.leaves(model)]


def test_what_is_not_split_is_said(saved: Path, caplog: pytest.LogCaptureFixture):
    hf.load_model(saved, mesh=qwen_eqx.make_mesh("data=2,model=4"))
    assert [record.message for record in caplog.records] == [
        "mesh data=2,model=4: kv_heads=2 is no multiple of model=4: every device holds all of them",
        "mesh data=2,model=4: vocab=97 is no multiple of model=4: every device holds all of them",
    ]


def test_values_that_are_not_finite_are_counted_once(tmp_path: Path):
    model = tiny.model("qwen2")
    broken = model.blocks[0].mlp.up.weight.at[3, 2].set(jnp.nan).at[20, 2].set(jnp.inf)
    tree = jax.tree.map(lambda leaf: broken if leaf is model.blocks[0].mlp.up.weight else leaf, model)
    qwen_eqx.save_pretrained(tree, None, tmp_path)
    said = []
    for mesh in (None, qwen_eqx.make_mesh("data=4,model=2")):
        with pytest.raises(InputError, match="found 2 values that are NaN or infinite") as raised:
            hf.load_model(tmp_path, mesh=mesh)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_a_model_too_large_is_refused_before_anything_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch):
    two = AbstractMesh((1, 2), sharding.AXES)
    free = sharding.bytes_per_device(hf.skeleton(CONFIG, jnp.dtype("float32")), two)
    monkeypatch.setattr(hf, "free_device_bytes", lambda devices: free)
    monkeypatch.setattr(hf, "_load", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError) as raised:
        hf.load_model(saved, dtype=jnp.float32, mesh=qwen_eqx.make_mesh("data=8"))
    assert "a device on mesh data=8,model=1, and 0.0 MB are free; expected model=2, with" in str(raised.value)


def test_72b_is_refused_with_the_mesh_that_would_do():
    skeleton = hf.skeleton(qwen_eqx.PRESETS["Qwen2.5-72B"], jnp.dtype("bfloat16"))
    with pytest.raises(
        InputError, match=r"145,412.4 MB a device on mesh data=8,model=1.*expected model=8, with 18,178"
    ):
        sharding.check_fits(skeleton, qwen_eqx.make_mesh("auto"), 24_000_000_000)
    with pytest.raises(InputError, match="no mesh splits it so far"):
        sharding.check_fits(skeleton, qwen_eqx.make_mesh("auto"), 1_000_000)
    sharding.check_fits(skeleton, qwen_eqx.make_mesh("auto"), None)


# ---------------------------------------------------------------- the flag


def test_without_the_flag_one_device():
    assert meshes.OnMesh().open_mesh() is None
    mesh = meshes.OnMesh(mesh="data=4,model=2").open_mesh()
    assert mesh is not None
    assert mesh.devices.shape == (4, 2)


def test_idle_accelerators_are_mentioned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    class Chip:
        platform = "tpu"

    monkeypatch.setattr(meshes.jax, "local_devices", lambda: [Chip()] * 4)
    assert meshes.OnMesh().open_mesh() is None
    assert "using 1 of 4 devices; --mesh auto uses all" in capsys.readouterr().out
