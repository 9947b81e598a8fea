"""Runs extract.py in processes that die: `python kill_extract.py WHOLE LOCATION STEP KILLS FLAGS` prints the deaths it took.

WHOLE is written by a run that nobody interrupts. In LOCATION/counted a process is ended at its STEP-th moment (before or
after a file operation, or one of the remote store's), the next one, which goes on, at its 2 STEP-th, until one gets
through. In LOCATION/killed KILLS processes are killed from outside. All are forks of one that has imported everything and
computed nothing, and they find their programs compiled: a death costs about what had been computed.
"""

import json
import os
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

import extract
from sae import storage

warnings.simplefilter("ignore")  # JAX warns of forks: it has computed nothing yet
whole, location, step, kills, flags = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
LOCAL = ((os, "fsync"), (os, "open"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"))
REMOTE = ((storage.Remote, "_persist"),)


def dying(after: int) -> Callable[[], None]:
    """What ends this process when it is called once more than `after` times."""
    left = iter(range(after))

    def count() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def around(count: Callable[[], None], original: Callable) -> Callable:
    def operation(*args, **kwargs):
        count()
        try:
            return original(*args, **kwargs)
        finally:
            count()

    return operation


def command(out: str, count: Callable[[], None]) -> int:
    """What extract.py exits with."""
    for owner, name in REMOTE if storage.is_url(out) else LOCAL:
        setattr(owner, name, around(count, getattr(owner, name)))
    os.dup2(2, 1)
    sys.argv = [extract.__file__, *flags, "--out", out]
    try:
        runpy.run_path(extract.__file__, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run(out: str, count: Callable[[], None] = lambda: None, kill_after: float | None = None) -> bool:
    """Whether a process of its own got through."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = command(out, count)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFEXITED(status)


assert run(whole)
deaths, moments = 0, step
begin = time.perf_counter()
while not run(f"{location}/counted", dying(moments)):
    deaths, moments, begin = deaths + 1, moments + step, time.perf_counter()
seconds = time.perf_counter() - begin  # of one that found some shards there
for patience in np.random.default_rng(0).uniform(0.3, 1.0, kills):
    deaths += not run(f"{location}/killed", kill_after=patience * seconds)
assert run(f"{location}/killed")
print(json.dumps(deaths))
