"""Checkpoints: exact, digested, refused when anything differs."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae.errors import DiskFull, InputError
from sae.training import checkpoint

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
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert checkpoint.steps(tmp_path) == []


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


def test_every_dtype_comes_back(tmp_path):
    state = {name: jnp.arange(5).astype(name) for name in ("bfloat16", "float16", "float32", "int32", "bool")}
    checkpoint.save(tmp_path, 1, state, {})
    again, _, _ = checkpoint.load(tmp_path, jax.tree.map(jnp.zeros_like, state))
    for name, value in state.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name], value)
