"""Two runs on one directory: the second is refused at once, naming the first; a dead run's mark blocks nobody."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import arc
from qwen_lab import InputError, locks
from running import ROOT, run_experiment, save_small, short_tasks

HOLD = """
import sys, time
from pathlib import Path
from qwen_lab import locks
with locks.claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""
FLAGS = {
    "extract": "--limit 1 --max-new-tokens 2",
    "solve_arc": "--limit 1 --max-new-tokens 2 --predictions-per-task 1",
    "train_sae": "--limit 3 --held-out 1 --max-prompt 512 --max-new-tokens 2 --buffer-rows 16384 --steps 2",
    "transform_dataset": "",
    "make_tiny_random": "",
    "train_lm": "--steps 2 --blocks 1 --d-model 16 --heads 2 --kv-heads 1 --d-ff 16 --families mirror --workers 0 "
    "--eval-tasks 1",
    "evaluate_lm": "--tasks-per-family 1 --votes 1",
    "find_features": "--limit 3 --max-prompt 512 --sae SAE --tasks TASKS",
    "pipeline": "--extract.limit 1 --train.steps 2",
}


@pytest.fixture
def holder(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_every_command_is_refused_a_directory_in_use(holder, tmp_path: Path):
    sae, tasks = save_small(tmp_path / "sae"), str(short_tasks(tmp_path))
    for command, flags in FLAGS.items():
        given = flags.replace("SAE", sae).replace("TASKS", tasks).split()
        done = run_experiment(command, *given, "--out", str(tmp_path / "out"))
        assert done.returncode == 2, (command, done.stderr)
        assert f"pid {holder.pid} on {socket.gethostname()} since " in done.stderr
        assert done.stderr.count("\n") == 1
        assert [path.name for path in (tmp_path / "out").iterdir()] == [locks.NAME]


def test_a_killed_runs_mark_blocks_nobody(holder, tmp_path: Path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / locks.NAME).exists()
    with locks.claimed(tmp_path / "out"):
        pass
    assert not list((tmp_path / "out").iterdir())


def test_two_runs_of_solve_at_once(tmp_path: Path):
    tasks, out = short_tasks(tmp_path), tmp_path / "out"
    flags = ["--tasks", str(tasks), "--max-new-tokens", "64", "--predictions-per-task", "8", "--out", str(out)]
    command = [sys.executable, str(ROOT / "experiments" / "solve_arc.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as first:
        while not (out / locks.NAME).exists() or not (out / locks.NAME).read_bytes():
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)  # it holds the directory for as long as the second one needs
        second = run_experiment("solve_arc", *flags)
        first.send_signal(signal.SIGCONT)
        assert second.returncode == 2
        assert f"pid {first.pid} on " in second.stderr
        assert first.wait(timeout=300) == 0
    assert len(arc.load_tasks(tasks)) == 3
    assert not (out / locks.NAME).exists()


def test_a_store_is_begun_beside_a_mark(tmp_path: Path):
    done = run_experiment("extract", *FLAGS["extract"].split(), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / locks.NAME).exists()


@pytest.mark.parametrize(("pid", "host", "free"), [(1, None, False), (2**22 + 1, None, True), (1, "another", True)])
def test_without_flock_a_living_process_of_this_host_blocks(
    tmp_path: Path, monkeypatch, pid: int, host: str, free: bool
):
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    (tmp_path / locks.NAME).write_text(f'{{"host": "{host or socket.gethostname()}", "pid": {pid}, "since": "then"}}')
    if free:
        with locks.claimed(tmp_path):
            pass
        return
    with pytest.raises(InputError, match=f"pid {pid} on .* since then"), locks.claimed(tmp_path):
        pass


def test_the_same_process_is_kept_out_too(tmp_path: Path):
    with locks.claimed(tmp_path), pytest.raises(InputError, match=f"pid {os.getpid()} "), locks.claimed(tmp_path):
        pass


def test_many_shares_find_a_dead_share_at_once(tmp_path: Path, monkeypatch):
    real = locks.new_mark
    monkeypatch.setattr(locks, "new_mark", lambda share: (time.sleep(0.02), real(share))[1])  # under the lock
    for round in range(3):
        (tmp_path / locks.NAME.replace(".tmp", "-2-of-2.tmp")).write_text("{}")
        begin = threading.Barrier(3)

        def work(number: int, begin: threading.Barrier = begin) -> None:
            begin.wait(30)
            with locks.claimed(tmp_path, locks.Share(number, 3)):
                begin.wait(30)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, (1, 2, 3)))
        assert not list(tmp_path.iterdir()), round
