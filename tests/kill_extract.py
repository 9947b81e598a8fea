"""Runs extract.py in processes that die: `python kill_extract.py WHOLE LOCATION STEP KILLS FLAGS` prints how many died.

WHOLE is written by a run that nobody interrupts. In LOCATION/counted a process is ended at its STEP-th moment (before or
after a file operation, or one of the remote store's), the next one, which goes on, at its 2 STEP-th, until one gets
through. In LOCATION/killed KILLS processes are killed from outside.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

import numpy as np

import forks

whole, location, step, kills, flags = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]


def run(out: str, count: Callable[[], None] = forks.never, kill_after: float | None = None) -> bool:
    """Whether a process got through."""
    child = forks.start(flags, out, count)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = forks.end(child)
    assert code in (0, -signal.SIGKILL), code
    return code == 0


assert run(whole)
deaths, moments = 0, step
begin = time.perf_counter()
while not run(f"{location}/counted", forks.dying(moments)):
    deaths, moments, begin = deaths + 1, moments + step, time.perf_counter()
seconds = time.perf_counter() - begin  # of one that found some shards there
killed = [
    not run(f"{location}/killed", kill_after=patience * seconds)
    for patience in np.random.default_rng(0).uniform(0.3, 1.0, kills)
]
assert run(f"{location}/killed")
print(json.dumps({"counted": deaths, "killed": sum(killed)}))
