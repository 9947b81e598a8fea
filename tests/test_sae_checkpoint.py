"""Checkpoints: exact, digested, refused when anything differs."""

import errno
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import sae
from sae import files, storage
from sae.errors import DiskFull, InputError
from sae.training import checkpoint


class _Pair(NamedTuple):
    a: Any
    n: Any


STATE = {"a": jnp.arange(3.0), "key": jax.random.key(3), "n": jnp.int32(7)}


def test_a_file_where_checkpoints_should_go_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(InputError, match="found a file, expected a directory"):
        checkpoint.save(tmp_path / "checkpoints", 1, {"a": jnp.zeros(2)})
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"state\.safetensors: found [\d,]+ bytes free .*, expected room for [\d,]+$"):
        checkpoint.save(tmp_path, 1, {"a": jnp.zeros(2)})
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.steps(tmp_path) == []
    with pytest.raises(DiskFull):
        checkpoint.save(tmp_path / "runs" / "new", 1, {"a": jnp.zeros(2)})
    assert list((tmp_path / "runs").iterdir()) == []


def test_no_room_for_a_directory_is_a_full_disk_too(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    module = sae.ReLU.init(d_model=2, d_sae=4, key=jax.random.key(0))
    monkeypatch.setattr(os, "mkdir", full)
    for write in (
        lambda where: checkpoint.save(where, 1, {"a": jnp.zeros(2)}),
        lambda where: sae.save(module, where),
        lambda where: sae.gallery.write(where / "site", "title", [], []),
    ):
        with pytest.raises(DiskFull, match=r"new.*: found [\d,]+ bytes free .*, expected room for [\d,]+$"):
            write(tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["²", "٣", "0000000²", "1", "-0000001", "00000001.old", "000000001", " 0000001"])
def test_only_the_names_that_save_gives_are_checkpoints(tmp_path, name):
    checkpoint.save(tmp_path, 2, STATE)
    checkpoint.save(tmp_path, 123456789, STATE)
    (tmp_path / name).mkdir()
    (tmp_path / name / "state.json").write_text("{}")
    assert checkpoint.steps(tmp_path) == [2, 123456789]
    assert checkpoint.load(tmp_path, STATE)[2] == 123456789


def test_round_trip_and_keep_last(tmp_path):
    for number in (1, 2, 3, 4):
        checkpoint.save(tmp_path, number, STATE, {"row": number}, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    like = {"a": jnp.zeros(3), "key": jax.random.key(0), "n": jnp.int32(0)}
    state, cursor, step = checkpoint.load(tmp_path, like)
    assert (cursor, step, int(state["n"])) == ({"row": 4}, 4, 7)
    np.testing.assert_array_equal(state["a"], STATE["a"])
    np.testing.assert_array_equal(jax.random.key_data(state["key"]), jax.random.key_data(STATE["key"]))


def test_damage_is_refused(tmp_path):
    with pytest.raises(InputError, match="checkpoints"):
        checkpoint.load(tmp_path, STATE)
    path = checkpoint.save(tmp_path, 1, STATE) / "state.safetensors"
    with pytest.raises(InputError, match="found"):
        checkpoint.load(tmp_path, {**STATE, "a": jnp.zeros(4)})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="digest"):
        checkpoint.load(tmp_path, STATE)


def test_a_large_one_goes_to_a_url_in_parts(monkeypatch):
    monkeypatch.setattr(storage, "AT_ONCE", 16)
    monkeypatch.setattr(checkpoint, "AT_ONCE", 16)
    state = {"a": jnp.arange(30.0).reshape(5, 6), "n": jnp.int32(7)}
    checkpoint.save("memory://checkpoint-in-parts", 1, state)
    again, _, _ = checkpoint.load("memory://checkpoint-in-parts", jax.tree.map(jnp.zeros_like, state))
    np.testing.assert_array_equal(again["a"], state["a"])


def _sliced(home, tensors):
    """A checkpoint as several processes leave one."""
    folder = home / "00000001"
    folder.mkdir()
    digests = {}
    for number, each in enumerate(tensors):
        name = f"state-{number:05d}-of-{len(tensors):05d}.safetensors"
        digests[name] = files.digest(safetensors.numpy.save(each))
        (folder / name).write_bytes(safetensors.numpy.save(each))
    note = {"format": 2, "step": 1, "digest": digests, "leaves": {}, "cursor": {}}
    (folder / "state.json").write_bytes(files.dump_json(note))


def test_slices_of_several_processes_are_put_together(tmp_path):
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    first = {"a[0:3,0:1]": whole[:, :1].copy(), "n[]": np.array(7, np.int32)}
    _sliced(tmp_path, [first, {"a[0:3,1:4]": whole[:, 1:].copy()}])
    again, _, _ = checkpoint.load(tmp_path, _Pair(jnp.zeros((3, 4)), jnp.int32(0)))
    np.testing.assert_array_equal(again.a, whole)
    assert int(again.n) == 7


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a[0:2]", "a[3:5]"], "found slices of 4 values, expected 5"),
        (["a[0:3]"], r"'a\[0:3\]' of shape \(2,\), expected a leaf's name and place"),
        (["a"], "expected a leaf's name and place"),
        (["a[x:2]"], "expected a leaf's name and place"),
    ],
)
def test_wrong_slices_are_refused(tmp_path, names, said):
    _sliced(tmp_path, [{name: np.zeros(2, np.float32)} for name in names])
    with pytest.raises(InputError, match=said):
        checkpoint.load(tmp_path, _Pair(jnp.zeros(5), None))


def test_every_dtype_comes_back(tmp_path):
    state = {name: jnp.arange(5).astype(name) for name in ("bfloat16", "float16", "float32", "int32", "bool")}
    checkpoint.save(tmp_path, 1, state, {})
    again, _, _ = checkpoint.load(tmp_path, jax.tree.map(jnp.zeros_like, state))
    for name, value in state.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name], value)
