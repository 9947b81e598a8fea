"""The activation store: plan, round trip, and resumption byte for byte after any kill."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import sae
import strategies
from stores import DIGESTED, MANIFEST, contents, cut, edit_json, same, shard_rows, write


@given(st.integers(0, 500), st.integers(1, 60))
def test_shards_part_the_items_in_order(items, items_per_shard):
    plan = sae.Plan(items, items_per_shard)
    assert [item for shard in range(plan.shards) for item in plan.items_of(shard)] == list(range(items))
    assert all(len(plan.items_of(shard)) == items_per_shard for shard in range(plan.shards - 1))


@given(st.integers(1, 60), st.integers(1, 9), st.data())
def test_workers_share_what_is_missing_even_if_they_look_at_different_times(shards, workers, data):
    plan, subsets = sae.Plan(shards, 1), st.sets(st.integers(0, shards - 1))
    missing = sorted(data.draw(subsets))
    shares = [plan.share(missing, worker, workers) for worker in range(workers)]
    assert sorted(shard for share in shares for shard in share) == missing  # disjoint, complete
    written, later = data.draw(subsets), []
    for worker in range(workers):  # each looks when others have written something
        later += plan.share([shard for shard in missing if shard not in written or shard in later], worker, workers)
    assert len(later) == len(set(later))
    assert set(later) | written >= set(missing)
    with pytest.raises(sae.InputError, match="expected 0 to"):
        plan.share(missing, workers, workers)


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
