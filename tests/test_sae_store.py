"""The activation store: plan, round trip, resumption byte for byte after any kill, and every refusal."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import sae
import strategies
from sae import files

MANIFEST = sae.Manifest(
    model_id="tiny", revision=None, config_digest="sha256:0", tokenizer_digest="sha256:1", sites=("a", "b"),
    dtype="bfloat16", d_model=3, seed=0, plan=sae.Plan(items=5, items_per_shard=2),
    config={"limit": 5, "sites": ("a",)}, versions={"jax": "0"},
)  # fmt: skip


def shard_rows(manifest: sae.Manifest, shard: int) -> sae.Rows:
    """Rows that depend on (shard) alone: item i has i % 3 + 1 of them."""
    rng = np.random.default_rng(shard)
    item = np.concatenate([np.full(i % 3 + 1, i, np.int32) for i in manifest.plan.items_of(shard)])
    activations = rng.normal(size=(len(item), len(manifest.sites), manifest.d_model))
    ids = rng.integers(0, 99, len(item), dtype=np.int32)
    positions = np.arange(len(item), dtype=np.int32)
    places = {name: rng.integers(-1, 9, len(item), dtype=np.int8) for name in manifest.columns}
    return sae.Rows(
        activations.astype(files.numpy_dtype(manifest.dtype)),
        ids,
        positions,
        item,
        rng.random(len(item)) < 0.5,
        **places,
    )


def write(directory: Path, manifest: sae.Manifest = MANIFEST, shards=None) -> None:
    writer = sae.StoreWriter.create(directory, manifest)
    for shard in writer.missing if shards is None else shards:
        outcomes = [
            {"text": f"item {i} \udc80", "outcome": {"solved": i % 2 == 0}} for i in writer.plan.items_of(shard)
        ]
        writer.write_shard(shard, shard_rows(manifest, shard), outcomes)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@given(st.integers(0, 500), st.integers(1, 60))
def test_shards_part_the_items_in_order(items, items_per_shard):
    plan = sae.Plan(items, items_per_shard)
    assert [item for shard in range(plan.shards) for item in plan.items_of(shard)] == list(range(items))
    assert all(len(plan.items_of(shard)) == items_per_shard for shard in range(plan.shards - 1))


@given(items=st.integers(0, 9), more=st.integers(0, 9), per_shard=st.integers(1, 4), done=st.integers(0, 9))
def test_an_extended_store_is_one_that_was_planned_so(tmp_path_factory, items, more, per_shard, done):
    def planned(items: int) -> sae.Manifest:
        config = MANIFEST.config | {"limit": items}
        return dataclasses.replace(MANIFEST, plan=sae.Plan(items, per_shard), config=config)

    where, whole = tmp_path_factory.mktemp("grown"), tmp_path_factory.mktemp("whole")
    short, long = planned(items), planned(items + more)
    write(where, short, shards=range(min(done, short.plan.shards)))
    before = contents(where)
    writer = sae.StoreWriter.extend(where, long, "limit")
    full = [f"shards/{shard:06d}." for shard in range(min(done, items // per_shard))]
    kept = {name: data for name, data in before.items() if name.startswith(tuple(full))}
    assert kept == {name: data for name, data in contents(where).items() if name in kept}
    assert set(writer.missing).isdisjoint(range(len(full)))
    write(where, long)
    write(whole, long)
    assert contents(where) == contents(whole)
    assert sae.ActivationStore.open(where).complete


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": sae.Plan(4, 2)}, "plan.items is 5 there and 4 in this run"),
        ({"plan": sae.Plan(7, 3)}, "plan.items_per_shard is 2 there and 3"),
        ({"seed": 1}, "seed is 0 there and 1"),
        ({"config": {"limit": 7, "sites": ("b",)}}, "config.sites"),
    ],
)
def test_a_store_is_not_extended_by_another_run(tmp_path, changes, said):
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(sae.InputError, match=re.escape(said)):
        sae.StoreWriter.extend(tmp_path, dataclasses.replace(MANIFEST, **changes), "limit")
    assert contents(tmp_path) == before


@given(strategies.manifest_fields(), st.data())
def test_a_store_is_the_concatenation_of_its_shards(tmp_path_factory, fields, data):
    manifest = sae.Manifest(**fields)
    directory = tmp_path_factory.mktemp("store")
    write(directory, manifest)
    store = sae.ActivationStore.open(directory)
    parts = [shard_rows(manifest, shard) for shard in range(manifest.plan.shards)]
    whole = sae.Rows.concatenate(parts)
    store.verify()
    assert store.complete
    assert len(store) == len(whole.item)
    index = np.array(data.draw(st.lists(st.integers(-len(store), len(store) - 1))), np.int64)
    sites = data.draw(st.lists(st.sampled_from(manifest.sites), unique=True, min_size=1))
    axis = [manifest.sites.index(site) for site in sites]
    found, expected = store.select(*sites)[index], cut(whole, index)
    same(found, expected._replace(activations=expected.activations[:, axis]))
    same(store[2:7], cut(whole, slice(2, 7)))
    same(store[-1], cut(whole, -1))
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(store.column(name), column)
    size, start = data.draw(st.integers(1, 8)), data.draw(st.integers(0, len(store)))
    batches = list(store.batches(size, order=index, start=start))
    assert sum(len(batch.item) for batch in batches) == max(0, len(index) - start)
    for number, batch in enumerate(batches):
        same(batch, cut(whole, index[start + number * size :][:size]))
    assert all(len(batch.item) == size for batch in store.batches(size, drop_last=True))


def same(found: sae.Rows, expected: sae.Rows) -> None:
    assert list(found.columns) == list(expected.columns)
    for name, column in expected.columns.items():
        assert found.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(found.columns[name], column)


def cut(rows: sae.Rows, index) -> sae.Rows:
    return sae.Rows(**{name: column[index] for name, column in rows.columns.items()})


def test_device_arrays_and_views_are_written_as_they_read(tmp_path):
    writer = sae.StoreWriter.create(tmp_path / "s", dataclasses.replace(MANIFEST, plan=sae.Plan(1, 1)))
    activations = jax.random.normal(jax.random.key(0), (3, 2, 4), jnp.bfloat16).transpose(2, 1, 0)  # not contiguous
    ids = np.arange(8, dtype=np.int32)[::2]
    rows = sae.Rows(activations, ids, jnp.arange(4, dtype=jnp.int32), np.zeros(4, np.int32), jnp.zeros(4, bool))
    writer.write_shard(0, rows, [{"text": "", "outcome": None, "grid": [[1, 2]]}])
    store = sae.ActivationStore.open(tmp_path / "s")
    same(store[:], cut(rows, slice(None)))
    assert store.items == {0: {"item": 0, "text": "", "outcome": None, "grid": [[1, 2]]}}


def test_an_unfinished_store_is_readable_and_says_what_is_missing(tmp_path):
    write(tmp_path, shards=[2])
    early = sae.ActivationStore.open(tmp_path)
    assert (early.complete, early.missing, set(early.items)) == (False, (0, 1), {4})
    same(early[:], shard_rows(MANIFEST, 2))
    write(tmp_path, shards=[0])
    assert sae.ActivationStore.open(tmp_path).missing == (1,)
    assert set(sae.ActivationStore.open(tmp_path).column("item")) == {0, 1, 4}
    assert sae.StoreWriter.create(tmp_path, MANIFEST).missing == (1,)


def test_an_empty_plan_is_a_complete_store(tmp_path):
    write(tmp_path, dataclasses.replace(MANIFEST, plan=sae.Plan(0, 4)))
    store = sae.ActivationStore.open(tmp_path)
    assert (len(store), store.complete, list(store.batches(4))) == (0, True, [])
    assert store[:].activations.shape == (0, 2, 3)
    assert store.column("positions").shape == (0,)


class Killed(BaseException):
    """Stands for SIGKILL: no handler may catch it."""


def killed_after(operations: int, patch: pytest.MonkeyPatch) -> None:
    """Let only so many file operations happen, then kill."""
    left = iter(range(operations))

    def limited(original):
        def operation(*args, **kwargs):
            if next(left, None) is None:
                raise Killed
            return original(*args, **kwargs)

        return operation

    for owner, name in [(files.os, "fsync"), (files.os, "open"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")]:
        patch.setattr(owner, name, limited(getattr(owner, name)))


def survives(directory: Path, operations: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        killed_after(operations, patch)
        try:
            write(directory)
        except Killed:
            return False
        return True


def test_killed_at_any_file_operation_twice_and_resumed_is_the_uninterrupted_store(tmp_path):
    write(tmp_path / "whole")
    expected, operations = contents(tmp_path / "whole"), 0
    while not survives(tmp_path / "killed", operations):
        survives(tmp_path / "killed", operations // 2)  # the resumption is killed too
        write(tmp_path / "killed")
        assert contents(tmp_path / "killed") == expected
        shutil.rmtree(tmp_path / "killed")
        operations += 1
    assert contents(tmp_path / "killed") == expected
    assert operations > 24  # four in each of the six files of the shards, at least


def test_resuming_another_run_shows_every_difference(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    other = dataclasses.replace(MANIFEST, seed=7, config={"limit": 5, "sites": ("a", "b"), "new": {"deep": True}})
    with pytest.raises(sae.InputError) as error:
        sae.StoreWriter.create(tmp_path, other)
    message = str(error.value)
    assert "\n" not in message
    for part in ("seed is 0 there and 7", "config.sites is ['a'] there and ['a', 'b']", "config.new.deep is 'absent'"):
        assert part in message
    assert contents(tmp_path) == before


DIGESTED = dataclasses.replace(MANIFEST, weights_digest="sha256:w", items_digest="sha256:i")


@pytest.mark.parametrize("name", ["weights_digest", "items_digest"])
def test_another_models_weights_or_other_items_do_not_go_on_with_a_store(tmp_path, name):
    write(tmp_path, DIGESTED, shards=[0])
    before = contents(tmp_path)
    with pytest.raises(sae.InputError, match=f"{name} is 'sha256:.' there and 'sha256:x' in this run"):
        sae.StoreWriter.create(tmp_path, dataclasses.replace(DIGESTED, **{name: "sha256:x"}))
    assert contents(tmp_path) == before
    unknown = dataclasses.replace(DIGESTED, **{name: ""})
    assert sae.StoreWriter.create(tmp_path, unknown).missing == (1, 2)  # who does not know it does not compare it
    assert contents(tmp_path) == before


def test_a_store_is_extended_only_if_the_items_it_has_are_the_same(tmp_path):
    write(tmp_path, DIGESTED)
    before = contents(tmp_path)
    more = dataclasses.replace(DIGESTED, plan=sae.Plan(8, 2), items_digest="sha256:more")
    with pytest.raises(sae.InputError, match="items_digest is 'sha256:i' there and 'sha256:x'"):
        sae.StoreWriter.extend(tmp_path, more, items_digest="sha256:x")
    other = dataclasses.replace(more, weights_digest="sha256:x")
    with pytest.raises(sae.InputError, match="weights_digest is 'sha256:w' there"):
        sae.StoreWriter.extend(tmp_path, other, items_digest="sha256:i")
    assert contents(tmp_path) == before
    assert sae.StoreWriter.extend(tmp_path, more, items_digest="sha256:i").manifest.to_json() == more.to_json()
    assert sae.Manifest.read(tmp_path / "manifest.json").items_digest == "sha256:more"


def test_a_store_of_an_earlier_version_is_read_and_resumed(tmp_path):
    """It said nothing of columns and digests."""
    write(tmp_path, shards=[0])
    edit_json(tmp_path / "manifest.json", columns="DROP", weights_digest="DROP", items_digest="DROP")
    same(sae.ActivationStore.open(tmp_path)[:], shard_rows(MANIFEST, 0))
    write(tmp_path, DIGESTED)
    assert sae.ActivationStore.open(tmp_path).complete
    with pytest.raises(sae.InputError, match=r"columns is \[\] there and \['colour'\] in this run"):
        sae.StoreWriter.create(tmp_path, dataclasses.replace(MANIFEST, columns=("colour",)))


def test_rows_of_other_columns_are_not_joined():
    rows = shard_rows(MANIFEST, 0)
    other = rows._replace(colour=np.zeros(len(rows.item), np.int8))
    with pytest.raises(sae.InputError, match="colour, expected activations"):
        sae.Rows.concatenate([rows, other])


def test_a_column_that_is_not_there_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(sae.InputError, match="column: found 'colour', expected one of activations, token_ids"):
        sae.ActivationStore.open(tmp_path).column("colour")


def test_another_patch_release_goes_on_with_the_store_as_it_is(tmp_path):
    """Versions are what the first run had: the finished bytes do not depend on who went on."""
    write(tmp_path / "whole")
    writer = sae.StoreWriter.create(tmp_path / "cut", MANIFEST)
    for entry in (tmp_path / "whole" / "shards").glob("000000.*"):
        shutil.copy(entry, tmp_path / "cut" / "shards")
    newer = dataclasses.replace(MANIFEST, versions={"jax": "0.0.1", "numpy": "9"})
    assert sae.StoreWriter.create(tmp_path / "cut", newer).missing == writer.missing == (1, 2)
    assert (tmp_path / "cut/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_rows_of_an_item_that_the_sidecar_does_not_name_are_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "shards" / "000001.safetensors"
    store = sae.ActivationStore.open(tmp_path)
    columns = {name: np.array(column) for name, column in store.shards[1].columns().columns.items()}
    columns["item"][-1] = 99
    safetensors.numpy.save_file(columns, path)
    with pytest.raises(sae.InputError, match=r"000001\.safetensors: item: found \d+ to 99, expected 2 to 3"):
        sae.ActivationStore.open(tmp_path).column("item")


def test_a_store_prints_in_one_line(tmp_path):
    write(tmp_path)
    assert len(repr(sae.ActivationStore.open(tmp_path)).splitlines()) == 1
    assert "3 shards" in repr(sae.ActivationStore.open(tmp_path))


def edit_json(path: Path, **fields) -> None:
    value = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: field for name, field in value.items() if field != "DROP"}))


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
    "NaN": (replaced(activations=np.full((3, 2, 3), np.nan, ROWS.activations.dtype)), "NaN or infinity"),
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
