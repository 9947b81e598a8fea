"""Commands in processes of their own that cost little: forks of one that has imported everything and computed nothing.

With a cache of compilations they find their programs compiled, so a process costs about what it computes.
"""

import os
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import extract
from sae import storage

warnings.simplefilter("ignore")  # JAX warns of forks: it has computed nothing yet
LOCAL = ((os, "fsync"), (os, "open"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"))
REMOTE = ((storage.Remote, "_persist"),)


def never() -> None:
    """Ends no process."""


def dying(after: int) -> Callable[[], None]:
    """What ends this process when it is called once more than `after` times."""
    left = iter(range(after))

    def count() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def start(flags: list[str], out: str, count: Callable[[], None] = never, script: str = str(extract.__file__)) -> int:
    """The process that runs a command; `count` is called before and after each file operation, or each of a store's."""
    if child := os.fork():
        return child
    code = 99
    try:
        code = _command([*flags, "--out", out], count, script)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def end(child: int) -> int:
    """What it exits with; less than 0 if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _command(arguments: list[str], count: Callable[[], None], script: str) -> int:
    for owner, name in REMOTE if storage.is_url(arguments[-1]) else LOCAL:
        setattr(owner, name, _around(count, getattr(owner, name)))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _around(count: Callable[[], None], original: Callable) -> Callable:
    def operation(*args, **kwargs):
        count()
        try:
            return original(*args, **kwargs)
        finally:
            count()

    return operation
