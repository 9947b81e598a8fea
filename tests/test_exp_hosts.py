"""One run of several processes: they agree before they begin, each takes its share, and none waits for another for ever."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ports import free_port, with_devices
from qwen_lab import InputError, RunError, cli, hosts
from qwen_lab.hosts import Hosts, OfHosts
from running import ROOT, short_tasks

FLAGS = "--mode forward --limit 5 --layers 1 --items-per-shard 1 --model tiny-random --tasks"


def test_several_processes_write_the_store_of_one(tmp_path: Path):
    """All of it in one harness: the start of each process is what costs."""
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(1), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": f"{ROOT}:{ROOT}/experiments"}
    command = [sys.executable, str(ROOT / "tests" / "host_extract.py"), str(tmp_path), *FLAGS.split()]
    tasks = short_tasks(tmp_path, 5)
    done = subprocess.run([*command, str(tasks)], capture_output=True, text=True, env=os.environ | own, timeout=500)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert ends == {
        "whole": [0], "together": [0, 0], "four": [0] * 4, "begun": [0, -9],
        "left": [f"{number:06d}.json" for number in (0, 1, 2, 4)], "killed": [0, 0, 0], "other": [2, 2],
    }, done.stderr  # fmt: skip
    line = (
        "process 1 of 2 was told otherwise than process 0: found config.seed is 1 and 0, seed is 1 and 0, expected the"
    )
    assert done.stderr.count(line) == 2
    assert not (tmp_path / "other").exists()
    expected = contents(tmp_path / "whole")
    assert len(expected) == 11
    for name in ("together", "four", "killed"):
        assert contents(tmp_path / name) == expected


def contents(store: Path) -> dict[str, bytes]:
    files = [store / "manifest.json", *(store / "shards").iterdir()]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(hosts, "WAIT", 20.0)
    monkeypatch.setattr(hosts, "SEEN_AFTER", 0.2)
    return free_port()


def meet(port: int, *ways: tuple[int, int, dict[str, Any], Path]) -> list[str]:
    """How each of several (number, processes, what it was told, home) ends."""

    def one(way: tuple[int, int, dict[str, Any], Path]) -> str:
        number, processes, said, home = way
        try:
            Hosts(f"localhost:{port}", processes, number).agree(said, home)
        except (InputError, RunError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(len(ways)) as pool:
        return list(pool.map(one, ways))


def test_all_begin_or_none(port: int, tmp_path: Path):
    said, here = {"seed": 0, "limit": None}, tmp_path / "here"
    assert meet(port, *((number, 4, said, here) for number in (2, 0, 3, 1))) == [""] * 4
    assert list(here.iterdir()) == []
    told = (
        "InputError: process 2 of 3 was told otherwise than process 0: found limit is 5 and None, b is 1 and None, exp"
    )
    ends = meet(port, (0, 3, said, here), (1, 3, said, here), (2, 3, said | {"limit": 5, "b": 1}, here))
    assert all(end.startswith(told) for end in ends)
    ends = meet(port, (0, 2, said, here), (1, 2, said, tmp_path / "elsewhere"))
    assert all("--out: process 1 of 2 found no" in end and "expected storage that all share" in end for end in ends)
    (tmp_path / "file").write_text("")
    ends = meet(port, (0, 2, said, tmp_path / "file"), (1, 2, said, tmp_path / "file"))
    assert "InputError: --out" in ends[0]
    assert "process 0 left before all had begun" in ends[1]


def test_who_does_not_belong_ends_all(port: int, tmp_path: Path):
    ends = meet(port, (0, 3, {}, tmp_path), (1, 2, {}, tmp_path))
    assert ends[0] == "InputError: --processes: found 2 in process 1, 3 in process 0"
    assert ends[1] == "RunError: process 0 left before all had begun (it ended); see what it said"
    ends = meet(port, (0, 3, {}, tmp_path), (1, 3, {}, tmp_path), (1, 3, {}, tmp_path))
    assert ends[0] == "InputError: --process-id: found 1 twice, expected each of 0 to 2 once"


def test_a_stranger_is_left_alone(port: int, tmp_path: Path):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, port, (0, 2, {}, tmp_path))
        for word in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": []}\n'):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), 5) as line:
                        line.sendall(word)
                    break
                except ConnectionRefusedError:
                    continue
        assert meet(port, (1, 2, {}, tmp_path)) == first.result() == [""]


def test_nobody_waits_for_ever(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "WAIT", 0.5)
    alone = meet(port, (0, 3, {}, tmp_path))
    assert alone == ["RunError: --coordinator: process 1, 2 of 3 did not come in 0.5 s, expected all"]
    alone = meet(port, (1, 2, {}, tmp_path))
    assert alone == [
        f"RunError: --coordinator localhost:{port}: found no answer in 0.5 s (Connection refused), expected process 0"
    ]
    with socket.create_server(("", port)):  # which takes everybody in and says nothing
        assert "process 0 left before all had begun (" in meet(port, (1, 2, {}, tmp_path))[0]
        assert f"InputError: --coordinator: found port {port} taken" in meet(port, (0, 2, {}, tmp_path))[0]


FLAGS_OF = [
    (("h:1", 2, None), "expected all three or none"),
    ((None, 2, 1), "expected all three or none"),
    (("h:1", 2, 2), "--process-id: found 2, expected 0 to 1 of --processes"),
    (("nowhere", 2, 1), "--coordinator: found 'nowhere', expected host:port"),
    (("h:99999", 2, 1), "--coordinator: found 'h:99999', expected host:port"),
]


@pytest.mark.parametrize(("said", "line"), FLAGS_OF)
def test_flags_that_name_no_process_are_refused(said: tuple[str | None, int | None, int | None], line: str):
    with pytest.raises(InputError, match=line):
        Hosts.of(OfHosts(coordinator=said[0], processes=said[1], process_id=said[2]))
    with pytest.raises(InputError, match="--workers-of: found 1/2 beside --processes, expected one of the two"):
        Hosts.of(OfHosts(workers_of="1/2", processes=2))


def test_flags_win_over_a_cluster_and_a_cluster_over_none(monkeypatch: pytest.MonkeyPatch):
    assert Hosts.of(OfHosts()) is None
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "8", "PROCID": "5", "LOCALID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    hosts._cluster.cache_clear()
    try:
        found = Hosts.of(OfHosts())
        assert found is not None
        assert found == Hosts(found.coordinator, 8, 5)
        assert found.coordinator.startswith("node3:")
        assert Hosts.of(OfHosts(processes=1)) is None
        assert Hosts.of(OfHosts(coordinator="h:1", processes=2, process_id=1)) == Hosts("h:1", 2, 1)
        assert Hosts.of(OfHosts(workers_of="1/2")) is None
        asked = []
        monkeypatch.setattr(hosts.jax.config, "update", lambda name, value: asked.append((name, value)))
        for alone in (cli.console, OfHosts(processes=1), OfHosts(coordinator="h:1", processes=2, process_id=1)):
            hosts.take_devices(alone)
        assert asked == []
        hosts.take_devices(OfHosts())
        assert asked == [("jax_cuda_visible_devices", "1"), ("jax_rocm_visible_devices", "1")]
    finally:
        hosts._cluster.cache_clear()
