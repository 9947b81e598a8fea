"""Two runs at one URL: the second is refused, naming the first; of those who find a dead run's mark one goes on."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import flaky
from qwen_lab import InputError, RunError, claims, stopping
from qwen_lab.locks import Share
from sae import storage

HERE = f"pid {os.getpid()} on "


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "PATIENCE", 1.5)
    return f"flaky://{tmp_path}/there"


def leave(url: str, name: str = ".running.000001.tmp", **said: object) -> None:
    """A mark that nobody writes again."""
    mark = {"host": "another", "pid": 7, "since": "then"} | said
    (storage.place(url) / name).put(json.dumps(mark).encode())


def names(url: str) -> list[str]:
    return sorted(storage.place(url).sizes())


def test_the_second_is_refused_and_named_the_first(url: str):
    with claims.claimed(url):
        assert names(url) == [".running.000001.tmp"]
        for share in (None, Share(1, 2)):
            refused = pytest.raises(InputError, match=f"--out {url}: found another run at work .*{HERE}")
            with refused, claims.claimed(url, share):
                pass
    assert names(url) == []
    with claims.claimed(url):
        pass


def test_shares_work_side_by_side_and_keep_all_others_out(url: str):
    with claims.claimed(url, Share(1, 2)), claims.claimed(url, Share(2, 2)):
        for share in (None, Share(2, 2), Share(3, 3)):
            with pytest.raises(InputError, match=r"with --workers-of [12]/2 "), claims.claimed(url, share):
                pass
    assert names(url) == []


def test_of_many_who_find_a_dead_runs_mark_one_goes_on(url: str):
    leave(url)
    leave(url, ".running-1-of-2.000004.tmp")
    done = threading.Barrier(6)

    def begin(number: int) -> str:
        try:
            with claims.claimed(url):
                done.wait(30)  # until all others were refused
                return "worked"
        except InputError as error:
            done.wait(30)
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        ends = list(pool.map(begin, range(6)))
    assert ends.count("worked") == 1
    assert all(HERE in end for end in ends if end != "worked")
    assert names(url) == []


def test_a_dead_process_of_this_machine_blocks_nobody_for_a_moment(url: str, monkeypatch: pytest.MonkeyPatch):
    if claims._machine() is None:
        pytest.skip("nothing tells processes of this machine")
    monkeypatch.setattr(claims, "PATIENCE", 1e6)
    leave(url, machine=claims._machine(), pid=2**22 + 1)
    with claims.claimed(url):
        pass


def test_a_run_that_was_taken_for_dead_ends(url: str, monkeypatch: pytest.MonkeyPatch):
    put, hung = flaky.Flaky.pipe_file, threading.Event()

    def hang(self: flaky.Flaky, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        if path.endswith(".000001.tmp"):
            assert hung.wait(20)
        put(self, path, value, mode, **kwargs)

    def work() -> None:
        with stopping.held(), claims.claimed(url):
            monkeypatch.setattr(flaky.Flaky, "pipe_file", hang)
            with claims.claimed(url):
                assert ".running.000002.tmp" in names(url)
                hung.set()
                while not stopping.asked():
                    time.sleep(0.01)
            stopping.check()

    with pytest.raises(RunError, match=r"this run was taken for dead, for it said nothing .*found another run"):
        work()
    assert names(url) == []


def test_shares_open_a_store_one_after_another(url: str):
    inside, most = [0], []

    def opened(number: int) -> None:
        with claims.turn(url):
            inside[0] += 1
            most.append(inside[0])
            time.sleep(0.1)
            inside[0] -= 1

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(opened, range(3)))
    assert most == [1, 1, 1]


def test_a_directory_needs_no_mark(tmp_path: Path):
    with claims.claimed(tmp_path / "none"), claims.turn(tmp_path / "none"):
        assert not (tmp_path / "none").exists()
