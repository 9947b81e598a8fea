"""What an activation store refuses: broken files, rows that do not fit, damage, and what is missing."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae import files
from sae.data.writer import find_damaged
from stores import MANIFEST, contents, edit_json, same, shard_rows, write


def manifest(**fields):
    return lambda directory: edit_json(directory / "manifest.json", **fields)


def sidecar(**fields):
    return lambda directory: edit_json(directory / "shards/000000.json", **fields)


def copy(source: str, target: str):
    return lambda directory: shutil.copy(directory / "shards" / source, directory / "shards" / target)


def trim(path: Path, keep: bytes, size: int) -> None:
    path.write_bytes((path.read_bytes() if not keep else keep * path.stat().st_size)[: path.stat().st_size - size])


BROKEN = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json"),
    "manifest is no JSON": (lambda d: (d / "manifest.json").write_text("{"), "no valid JSON"),
    "manifest is a list": (lambda d: (d / "manifest.json").write_text("[]"), "found list"),
    "manifest is a pointer": (lambda d: (d / "manifest.json").write_text("version https://git-lfs"), "no valid JSON"),
    "manifest is binary": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "no valid JSON"),
    "another version": (manifest(format_version=2), "format_version: found 2"),
    "no version": (manifest(format_version="DROP"), "format_version: found nothing"),
    "a field is missing": (manifest(seed="DROP"), "seed: found nothing"),
    "an unknown field": (manifest(colour=1), "colour: found an unknown field"),
    "a float for an int": (manifest(d_model=3.0), "d_model: found 3.0"),
    "an unknown column": (manifest(columns=["colour", "smell"]), "columns: found ('colour', 'smell')"),
    "columns in another order": (manifest(columns=["colour", "row"]), "columns: found"),
    "a column that no shard has": (manifest(columns=["colour"]), "colour: found nothing, expected int8 [3]"),
    "a digest is a number": (manifest(weights_digest=3), "weights_digest: found 3"),
    "a bool for an int": (manifest(seed=True), "seed: found True"),
    "an unknown dtype": (manifest(dtype="int8"), "dtype: found 'int8'"),
    "no sites": (manifest(sites=[]), "sites: found"),
    "sites are numbers": (manifest(sites=[1, 2]), "sites: found"),
    "a site twice": (manifest(sites=["a", "a"]), "sites: found"),
    "an impossible plan": (manifest(plan={"items": 5, "items_per_shard": 0}), "at least 1"),
    "a plan without items": (manifest(plan={"items_per_shard": 1}), "plan.items: found"),
    "another plan": (manifest(plan={"items": 5, "items_per_shard": 3}), "item_range"),
    "a shard is gone": (lambda d: (d / "shards/000001.safetensors").unlink(), "bytes: found no file"),
    "a shard is short": (lambda d: trim(d / "shards/000001.safetensors", b"", 1), "bytes: found"),
    "a shard is another one": (copy("000000.safetensors", "000002.safetensors"), "000002.safetensors: bytes"),
    "rows disagree": (sidecar(rows=9), "activations: found bfloat16"),
    "the width disagrees": (manifest(d_model=4), "activations: found bfloat16"),
    "a sidecar is empty": (lambda d: (d / "shards/000000.json").write_text(""), "no valid JSON"),
    "a sidecar lacks rows": (sidecar(rows="DROP"), "rows: found nothing"),
    "a sidecar lost an item": (sidecar(items=[]), "items: expected"),
    "a sidecar's item is a text": (sidecar(items=["x", "y"]), "items: expected"),
    "a sidecar of no shard": (copy("000000.json", "000003.json"), "no planned"),
    "a stray sidecar": (copy("000000.json", "notes.json"), "no planned"),
    "a shard is noise": (lambda d: trim(d / "shards/000000.safetensors", b"\xff", 0), "no valid safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_store_is_refused_in_one_line(tmp_path, name):
    breaks, expected = BROKEN[name]
    write(tmp_path / "store")
    breaks(tmp_path / "store")
    with pytest.raises(sae.InputError, match=re.escape(expected)) as error:
        sae.ActivationStore.open(tmp_path / "store")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    before = contents(tmp_path)
    with pytest.raises(sae.InputError):
        write(tmp_path / "store")
    assert contents(tmp_path) == before


def test_a_flipped_bit_is_found_by_verify(tmp_path):
    write(tmp_path)
    path = tmp_path / "shards/000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(sae.InputError, match=r"digest of 000001\.safetensors"):
        sae.ActivationStore.open(tmp_path).verify()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_not_a_store_is_not_written_into(tmp_path, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("thesis")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("thesis")
    before = contents(tmp_path)
    with pytest.raises(sae.InputError, match="precious"):
        sae.StoreWriter.create(target, MANIFEST)
    assert contents(tmp_path) == before


def replaced(**fields):
    return lambda: (shard_rows(MANIFEST, 0)._replace(**fields), GOOD)


GOOD = [{"text": "", "outcome": 1}] * 2
ROWS = shard_rows(MANIFEST, 0)
UNWRITABLE = {
    "another width": (replaced(activations=np.zeros((3, 2, 4), ROWS.activations.dtype)), "activations: found"),
    "another site count": (replaced(activations=np.zeros((3, 1, 3), ROWS.activations.dtype)), "activations: found"),
    "another dtype": (replaced(activations=np.zeros((3, 2, 3), np.float32)), "found float32 [3, 2, 3], expected bf"),
    "NaN": (
        replaced(activations=np.full((3, 2, 3), np.nan, ROWS.activations.dtype)),
        "found NaN or infinity in 3 rows, the first of them item 0, position 0 at a, expected finite numbers",
    ),
    "items out of order": (replaced(item=np.array([1, 0, 1], np.int32)), "item: found items out of order"),
    "ids are short": (replaced(token_ids=np.zeros(2, np.int32)), "token_ids: found int32 [2]"),
    "positions are int64": (replaced(positions=np.zeros(3, np.int64)), "positions: found int64"),
    "a column that the manifest lacks": (replaced(colour=np.zeros(3, np.int8)), "colour: found int8 [3], expected nothing"),
    "an item of another shard": (replaced(item=np.full(3, 2, np.int32)), "item: found 2 to 2"),
    "an item too few": (lambda: (ROWS, GOOD[:1]), "expected 2 of them"),
    "no outcome": (lambda: (ROWS, [{"text": ""}] * 2), "each with text and outcome"),
    "an outcome JSON cannot hold": (lambda: (ROWS, [{"text": "", "outcome": {1, 2}}] * 2), "JSON cannot hold"),
    "an outcome of NaN": (lambda: (ROWS, [{"text": "", "outcome": float("nan")}] * 2), "JSON cannot hold"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_shard_that_does_not_fit_is_refused_and_nothing_written(tmp_path, name):
    make, expected = UNWRITABLE[name]
    writer = sae.StoreWriter.create(tmp_path, MANIFEST)
    before = contents(tmp_path)
    with pytest.raises(sae.InputError, match=re.escape(expected)) as error:
        writer.write_shard(0, *make())
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_arguments_out_of_range_are_refused(tmp_path):
    write(tmp_path)
    store, writer = sae.ActivationStore.open(tmp_path), sae.StoreWriter.create(tmp_path, MANIFEST)
    with pytest.raises(sae.InputError, match="written once"):
        writer.write_shard(0, shard_rows(MANIFEST, 0), GOOD)
    with pytest.raises(sae.InputError, match="expected 0 to 2"):
        writer.write_shard(3, shard_rows(MANIFEST, 0), GOOD)
    with pytest.raises(sae.InputError, match="'c', expected of a, b"):
        store.select("c")
    with pytest.raises(sae.InputError, match="batch_size"):
        next(store.batches(0))
    with pytest.raises(IndexError):
        store[len(store)]
    with pytest.raises(IndexError):
        store[np.array([0, -len(store) - 1])]
    with pytest.raises(sae.InputError, match="manifest: dtype: found 'int8'"):
        sae.StoreWriter.create(tmp_path / "new", dataclasses.replace(MANIFEST, dtype="int8"))
    assert not (tmp_path / "new").exists()


def damaged(shard: int, how: str):
    """A way to spoil a committed shard so that its size stays."""

    def spoil(directory: Path) -> None:
        tensors, mark = (directory / f"shards/{shard:06d}{ending}" for ending in (".safetensors", ".json"))
        if how == "flipped bit":
            data = bytearray(tensors.read_bytes())
            data[-3] ^= 1
            tensors.write_bytes(data)
        elif how == "wrong digest":
            edit_json(mark, digest="sha256:0")
        elif how == "NaN rows":
            rows = shard_rows(MANIFEST, shard)
            rows.activations[1, 0, 2] = np.nan
            data = safetensors.numpy.save(rows.columns)
            tensors.write_bytes(data)
            edit_json(mark, digest=files.digest(data))
        elif how == "items out of order":
            rows = shard_rows(MANIFEST, shard)
            data = safetensors.numpy.save(rows._replace(item=rows.item[::-1].copy()).columns)
            tensors.write_bytes(data)
            edit_json(mark, digest=files.digest(data))
        elif how == "no tensors":
            tensors.unlink()
        elif how == "short":
            trim(tensors, b"", 1)
        elif how == "no JSON":
            mark.write_text("{")

    return spoil


AT_FIRST_USE = {
    "flipped bit": "digest: found sha256:",
    "wrong digest": "expected 'sha256:0' as its sidecar says",
    "NaN rows": "found NaN or infinity in 1 rows, the first of them item 1, position 1 at a",
    "items out of order": "items out of order",
}


@pytest.mark.parametrize("how", AT_FIRST_USE)
def test_damage_is_found_before_it_is_used(tmp_path, how):
    write(tmp_path)
    damaged(0, how)(tmp_path)
    store = sae.ActivationStore.open(tmp_path)
    for use in (lambda: store[0], lambda: store.column("item"), lambda: list(store.batches(2)), store.verify):
        with pytest.raises(sae.InputError, match=re.escape(AT_FIRST_USE[how])) as error:
            use()
        assert "\n" not in str(error.value)
        assert "000000.safetensors" in str(error.value)
    same(store[-2:], shard_rows(MANIFEST, 2))  # the others are as good as before


def test_a_shard_is_read_through_once_and_again_if_its_file_changed(tmp_path, monkeypatch):
    read = []
    original = files.digest_file
    monkeypatch.setattr(files, "digest_file", lambda path: (read.append(path.name), original(path))[1])
    write(tmp_path)
    for _ in range(3):
        store = sae.ActivationStore.open(tmp_path)
        same(store[:], store.select("a", "b")[:])
    assert sorted(read) == [f"{shard:06d}.safetensors" for shard in range(3)]
    damaged(1, "flipped bit")(tmp_path)
    with pytest.raises(sae.InputError, match="digest"):
        store[:]


def test_an_unfinished_store_says_what_is_missing_to_who_needs_it_whole(tmp_path):
    write(tmp_path, shards=[1])
    with pytest.raises(sae.InputError, match=r"found 1 of 3 shards, missing 0, 2, expected all: give the command"):
        sae.ActivationStore.open(tmp_path).expect_complete()
    write(tmp_path)
    sae.ActivationStore.open(tmp_path).expect_complete()


@given(st.dictionaries(st.integers(0, 1), st.sampled_from([*AT_FIRST_USE, "no tensors", "short", "no JSON"])))
@settings(max_examples=8)
def test_damaged_shards_are_taken_back_and_written_again(tmp_path_factory, spoiled):
    directory = tmp_path_factory.mktemp("store")
    write(directory)
    before = contents(directory)
    for shard, how in spoiled.items():
        damaged(shard, how)(directory)
    found = find_damaged(directory)
    assert found.keys() == spoiled.keys()
    assert all(f"{shard:06d}" in said and "\n" not in said for shard, said in found.items())
    assert sae.StoreWriter.take_back_damaged(directory) == found
    assert sae.StoreWriter.create(directory, MANIFEST).missing == tuple(sorted(spoiled))
    write(directory)
    assert contents(directory) == before
