"""Writes a store in processes that die: `python kill_writer.py LOCATION HOW SEED` prints the deaths it took, as JSON.

HOW boundary: for n = 0, 1, 2 … a process is ended at its n-th boundary (a file operation, or the moment before or after
one of the remote store's), the next one at half of that, and a third goes through. HOW signal: SIGKILL comes from outside
at a random time, until a process gets through. After each the bytes must be those of an uninterrupted run.
"""

import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

import stores
from flaky import UPLOADING, Flaky, seeded
from sae import storage

warnings.simplefilter("ignore")  # JAX warns of forks: the processes here never compute
storage.FIRST_PAUSE = 0.0
location, how, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
remote = storage.is_url(location)
directory = Path(location.removeprefix("flaky://"))


def dying(after: int) -> Callable[[], None]:
    """What ends this process when it is called once more than `after` times."""
    left = iter(range(after))

    def count() -> None:
        if next(left, None) is None:
            os._exit(9)

    return count


def before(count: Callable[[], None], original: Callable) -> Callable:
    def operation(*args, **kwargs):
        count()
        return original(*args, **kwargs)

    return operation


def arm(count: Callable[[], None]) -> None:
    if remote:
        errors = seeded(seed, 0.1)

        def fault(moment: str) -> None:
            count()
            errors(moment)

        Flaky.fault = staticmethod(fault)
    else:
        for owner, name in ((os, "fsync"), (os, "open"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
            setattr(owner, name, before(count, getattr(owner, name)))


def run(count: Callable[[], None], kill_after: float | None = None) -> bool:
    """Whether a process of its own wrote the whole store."""
    child = os.fork()
    if not child:
        try:
            arm(count)
            stores.write(location)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 9), status
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def check() -> None:
    found = stores.contents(directory)
    assert {name: data for name, data in found.items() if UPLOADING not in name} == expected  # no object came of those
    shutil.rmtree(directory)


stores.write(directory.parent / "whole")
expected, deaths = stores.contents(directory.parent / "whole"), 0
if how == "boundary":
    while not run(dying(deaths)):
        run(dying(deaths // 2))
        assert run(lambda: None)
        check()
        deaths += 1
    check()
else:
    rng = np.random.default_rng(seed)
    begin = time.perf_counter()
    assert run(lambda: None)
    whole = time.perf_counter() - begin
    check()
    rounds = 0
    while rounds < 5 or (not deaths and rounds < 50):  # on a busy machine a process may be through before its signal
        rounds, patience = rounds + 1, 1.0
        while not run(lambda: None, rng.uniform(0, whole) * patience):
            deaths += 1
            patience *= 1.1
        check()
print(json.dumps(deaths))
