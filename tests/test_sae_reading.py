"""Reading a store for training: a permutation that continues exactly, items, statistics, and batches that are ready."""

import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae
from sae.data import statistics as statistics_module
from sae.data.shuffle import permutation
from stores import MANIFEST, contents, edit_json, same, write

LONG = dataclasses.replace(MANIFEST, plan=sae.Plan(items=17, items_per_shard=2), columns=("colour",))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> sae.ActivationStore:
    directory = tmp_path_factory.mktemp("store")
    write(directory, LONG)
    return sae.ActivationStore.open(directory)


def numbered(store: sae.ActivationStore, rows: sae.Rows) -> list[bytes]:
    """What tells each row from the others."""
    return [np.asarray(row).tobytes() for row in rows.activations]


@given(st.integers(0, 2000), st.lists(st.integers(-(2**70), 2**70), max_size=3))
def test_a_permutation_has_every_number_once(count, seed):
    assert sorted(permutation(count, *seed).tolist()) == list(range(count))


def test_a_permutation_is_the_same_everywhere_and_forever():
    """A cursor of last year continues: these numbers must not change."""
    assert permutation(8, 0, 0, -1).tolist() == [2, 7, 0, 1, 6, 4, 5, 3]
    assert permutation(8, 1, 0, -1).tolist() != permutation(8, 0, 0, -1).tolist()


def test_a_permutation_moves_numbers_evenly():
    """Over seeds each number comes to each place about as often: χ² of 16 places within its 1e-6 quantile."""
    places = np.array([np.argsort(permutation(16, seed)) for seed in range(2000)])
    for number in range(16):
        counts = np.bincount(places[:, number], minlength=16)
        assert np.square(counts - 125).sum() / 125 < 60


@given(seed=st.integers(0, 99), batch=st.integers(1, 50), window=st.integers(1, 12), stop=st.integers(0, 60))
def test_an_epoch_is_a_permutation_and_any_cursor_continues_it(store, seed, batch, window, stop):
    whole = list(sae.shuffled(store, batch, seed=seed, window=window, epochs=2))
    rows = [row for each in whole for row in numbered(store, each.rows)]
    half = len(rows) // 2
    everything = sorted(numbered(store, store[:]))
    assert sorted(rows[:half]) == sorted(rows[half:]) == everything
    assert rows[:half] != rows[half:]
    assert all(len(each.rows.item) == batch for each in whole[: len(store) // batch])
    stop = min(stop, len(whole) - 1)
    cursor = json.loads(json.dumps(whole[stop].cursor))
    rest = list(sae.shuffled(store, batch, epochs=2, cursor=cursor))  # seed and window are the cursor's
    assert [each.cursor for each in rest] == [each.cursor for each in whole[stop + 1 :]]
    for one, other in zip(rest, whole[stop + 1 :], strict=True):
        same(one.rows, other.rows)


def test_the_batch_size_does_not_change_the_order(store):
    def order(batch):
        return [row for each in sae.shuffled(store, batch, seed=3, window=2) for row in numbered(store, each.rows)]

    assert order(1) == order(7) == order(1000)


def test_few_shards_are_open_at_once(store):
    shard_of = {row: shard.index for shard in store.shards for row in numbered(store, shard.columns())}
    rows = [shard_of[row] for each in sae.shuffled(store, 5, seed=1, window=3) for row in numbered(store, each.rows)]
    first, last = ({shard: order.index(shard) for shard in set(rows)} for order in (rows, rows[::-1]))
    for place in range(len(rows)):
        assert sum(first[shard] <= place < len(rows) - last[shard] for shard in first) <= 3


def test_an_epoch_keeps_to_its_shards_while_the_store_grows(tmp_path):
    write(tmp_path, LONG, shards=[1, 4])
    few = sae.ActivationStore.open(tmp_path)
    batch, cursor = next(sae.shuffled(few, 2))
    write(tmp_path, LONG)
    grown = sae.ActivationStore.open(tmp_path)
    seen = [each.rows for each in sae.shuffled(grown, 2, epochs=2, cursor=cursor)]
    rows = [row for each in [batch, *seen] for row in numbered(grown, each)]
    assert sorted(rows[: len(few)]) == sorted(numbered(few, few[:]))
    assert sorted(rows[len(few) :]) == sorted(numbered(grown, grown[:]))
    with pytest.raises(sae.InputError, match=r"found no shards \[0, 2, 3"):
        list(sae.shuffled(few, 2, cursor=next(sae.shuffled(grown, 2)).cursor))


@pytest.mark.parametrize("change", [{"row": -1}, {"epoch": 1.5}, {"shards": "x"}, {"seed": None}, {"window": 0}])
def test_a_cursor_from_elsewhere_is_refused(store, change):
    cursor = next(sae.shuffled(store, 2)).cursor | change
    with pytest.raises(sae.InputError, match="cursor: found"):
        next(sae.shuffled(store, 2, cursor=cursor))


def test_a_store_without_rows_has_no_batches(tmp_path):
    write(tmp_path, shards=[])
    assert list(sae.shuffled(sae.ActivationStore.open(tmp_path), 4, epochs=None)) == []


def test_an_item_is_its_rows_and_what_is_said_of_it(tmp_path):
    write(tmp_path, LONG, shards=[0, 3])
    edit_json(tmp_path / "shards/000000.json", item_rows="DROP")  # as earlier versions wrote it
    store = sae.ActivationStore.open(tmp_path)
    for number in (0, 1, 6, 7):
        rows, said = store.item(number)
        assert set(rows.item.tolist()) == {number}
        assert len(rows.item) == (store.column("item") == number).sum() == len(store.item_rows[number])
        assert said == store.items[number]
    with pytest.raises(sae.InputError, match="no committed item 2"):
        store.item(2)


def test_statistics_are_those_of_the_rows_kept_and_renewed(tmp_path, monkeypatch):
    write(tmp_path, LONG, shards=range(8))
    store = sae.ActivationStore.open(tmp_path)
    found = sae.statistics(store)
    rows = np.asarray(store[:].activations).astype(np.float64)
    norms = np.linalg.norm(rows, axis=-1)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.mean_norm, norms.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.root_mean_square, np.sqrt(np.square(norms).mean(0)), rtol=1e-6)
    exact = np.quantile(norms, statistics_module.LEVELS, axis=0, method="inverted_cdf").T
    np.testing.assert_allclose(found.quantiles, exact, rtol=2 ** (1 / 64) - 1)
    np.testing.assert_allclose(found.quantiles[:, [0, -1]], exact[:, [0, -1]], rtol=1e-6)
    kept = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(statistics_module, "compute", pytest.fail)
        for one, other in zip(sae.statistics(store), found, strict=True):
            np.testing.assert_array_equal(one, other)
    write(tmp_path, LONG)
    grown = sae.ActivationStore.open(tmp_path)
    assert sae.statistics(grown).rows == len(grown) > found.rows
    assert {name for name, data in contents(tmp_path).items() if name in kept and kept[name] != data} == {
        "statistics.json",
        "statistics.safetensors",
    }
    (tmp_path / "statistics.safetensors").write_bytes(b"noise")
    assert sae.statistics(grown).rows == len(grown)


def test_batches_are_made_ahead_and_arrive_in_order_on_the_device(store):
    made = []

    def batches():
        for rows, cursor in sae.shuffled(store, 4, seed=5):
            made.append(cursor)
            yield rows, cursor

    ready = sae.prefetched(batches(), ahead=2)
    rows, _ = next(ready)
    assert isinstance(rows.activations, jax.Array)
    assert rows.pair is None
    for _ in range(200):
        if len(made) == 4:
            break
        time.sleep(0.01)
    assert len(made) == 4  # one taken, two waiting, one in the hands of the thread
    rest = [rows, *(each for each, _ in ready)]
    expected = [each.rows for each in sae.shuffled(store, 4, seed=5)]
    for one, other in zip(rest, expected, strict=True):
        same(jax.tree.map(np.asarray, one), other)


def test_what_fails_while_reading_ahead_is_raised_where_it_is_used():
    def batches():
        yield np.zeros(1)
        raise sae.InputError("shards/000001: damaged")

    ready = sae.prefetched(batches())
    next(ready)
    with pytest.raises(sae.InputError, match="damaged"):
        next(ready)


def test_a_reader_that_is_left_stops_its_thread():
    ready = sae.prefetched(iter(lambda: np.zeros(1), None), ahead=1)
    next(ready)
    assert [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    ready.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    with pytest.raises(sae.InputError, match="ahead: found 0"):
        next(sae.prefetched([], ahead=0))
