"""Shards gathered in any order and written beside; what fails stops the run; shares of one plan."""

import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae
from qwen_lab import InputError, locks
from qwen_lab.locks import Share
from qwen_lab.meter import Meter
from qwen_lab.writing import Background, Shards

ITEMS = 7


def store(directory: Path, per_shard: int = 2) -> sae.StoreWriter:
    manifest = sae.Manifest(
        model_id="m", revision=None, config_digest="c", tokenizer_digest="t", sites=("s",), dtype="float32", d_model=2,
        seed=0, plan=sae.Plan(ITEMS, per_shard), config={}, versions={},
    )  # fmt: skip
    return sae.StoreWriter.create(directory, manifest)


def rows(number: int) -> sae.Rows:
    count = number % 3
    ints = np.arange(count, dtype=np.int32)
    return sae.Rows(np.ones((count, 1, 2), np.float32), ints, ints, np.full(count, number, np.int32), ints > 0)


def fill(shards: Shards, order) -> None:
    for number in order:
        shards.add(number, rows(number), {"text": str(number), "outcome": "x"})


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "shards").iterdir())}


@given(st.permutations(range(ITEMS)), st.integers(1, 4))
def test_any_order_gives_the_same_store(tmp_path_factory, order: list[int], per_shard: int):
    where = tmp_path_factory.mktemp("stores")
    for name, numbers in (("plain", range(ITEMS)), ("mixed", order)):
        shards = Shards(store(where / name, per_shard))
        fill(shards, numbers)
        assert not shards.missing
        assert not shards.begun
    assert contents(where / "plain") == contents(where / "mixed")


def test_it_writes_beside_and_all_is_there_at_the_end(tmp_path: Path):
    writer, meter = store(tmp_path / "s"), Meter(1)
    names = set()

    def write(*shard) -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.01)
        writer.write_shard(*shard)

    with Background(write, meter, room=1) as background:
        fill(Shards(writer, write=background.put), range(ITEMS))
    assert not writer.missing
    assert meter.counts["shards"] == 4
    assert names != {threading.current_thread().name}
    assert meter.writing > 0


def test_what_fails_stops_the_run_and_later_shards_are_not_written(tmp_path: Path):
    writer = store(tmp_path / "s", 1)

    def write(shard: int, *rest) -> None:
        if shard == 2:
            raise OSError("the disk is gone")
        writer.write_shard(shard, *rest)

    def run() -> None:
        with Background(write, Meter(1), room=1) as background:
            fill(Shards(writer, write=background.put), range(ITEMS))

    with pytest.raises(OSError, match="the disk is gone"):
        run()
    assert writer.missing == (2, 3, 4, 5, 6)


def test_the_last_shard_may_fail_too(tmp_path: Path):
    writer = store(tmp_path / "s", ITEMS)

    def run() -> None:
        with Background(mock.Mock(side_effect=OSError("no room")), Meter(1)) as background:
            fill(Shards(writer, write=background.put), range(ITEMS))
            time.sleep(0.05)  # it has failed before the end, or does so there

    with pytest.raises(OSError, match="no room"):
        run()


def test_an_error_of_the_run_itself_leaves_what_was_handed_on_written(tmp_path: Path):
    writer = store(tmp_path / "s", 1)

    def run() -> None:
        with Background(writer.write_shard, Meter(1)) as background:
            fill(Shards(writer, write=background.put), range(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert writer.missing == (3, 4, 5, 6)


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "a/b", "-1/2", "1/2/3"])
def test_a_share_is_one(text: str):
    with pytest.raises(InputError, match="--workers-of: found"):
        Share.parse(text)


def test_runs_with_different_shares_work_side_by_side_and_keep_others_out(tmp_path: Path):
    first, second = Share(1, 2), Share(2, 2)
    with locks.claimed(tmp_path, first):
        with locks.claimed(tmp_path, second):
            for other in (first, Share(1, 3), None):
                with pytest.raises(InputError, match=r"found another run at work there \(with --workers-of"):
                    locks.claimed(tmp_path, other).__enter__()
        with locks.claimed(tmp_path, second), locks.turn(tmp_path):
            pass
    with locks.claimed(tmp_path), pytest.raises(InputError, match="found another run at work there"):
        locks.claimed(tmp_path, first).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_dead_runs_share_blocks_nobody(tmp_path: Path):
    (tmp_path / locks.NAME).write_text("")
    (tmp_path / ".running-1-of-3.tmp").write_text("")
    with locks.claimed(tmp_path, Share(1, 2)):
        pass
    assert not list(tmp_path.iterdir())
