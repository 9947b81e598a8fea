"""Runs train_lm.py and train_sae.py in two processes: `python host_train.py WHERE LM LIVE` prints their exits as JSON.

WHERE/lm is ended by SIGTERM to one process, gone on with and ended by Ctrl-C in the other, and then by a kill. WHERE/live,
a dictionary whose rows a model makes on the devices of both, is trained to its end.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forks
import train_lm
import train_sae
from ports import free_port
from sae.training import checkpoint

where, lm_flags, live_flags = Path(sys.argv[1]), *(words.split() for words in sys.argv[2:])
SECONDS = 400  # until a process is ended that ought to have ended


def run(script: str, name: str, flags: list[str], then: Callable[[list[int]], None] = lambda both: None) -> list[int]:
    """What two processes exit with; what they say is in WHERE/NAME.0 and WHERE/NAME.1."""
    common = [*flags, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    both = [start(script, name, number, [*common, "--process-id", str(number)]) for number in range(2)]
    try:
        then(both)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and any(os.waitid(os.P_PID, each, ENDED) is None for each in both):
            time.sleep(0.05)
    finally:
        for each in both:
            os.kill(each, signal.SIGKILL)  # does nothing to what has ended and was not waited for
    return [forks.end(each) for each in both]


ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def start(script: str, name: str, number: int, flags: list[str]) -> int:
    sys.stderr.flush()
    kept, said = os.dup(2), os.open(where / f"{name}.{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 2)
    try:
        return forks.start(flags, str(where / name), script=script)
    finally:
        os.dup2(kept, 2)
        os.close(said)
        os.close(kept)


def once_a_step_is_saved(number: int, sent: int) -> Callable[[list[int]], None]:
    """Sends a signal to one of both when they have saved another step than those that stand."""
    saved = where / "lm" / "checkpoints"
    before, end = checkpoint.steps(saved)[-1:], time.monotonic() + SECONDS

    def wait(both: list[int]) -> None:
        while checkpoint.steps(saved)[-1:] == before and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(both[number], sent)

    return wait


lm, ends = str(train_lm.__file__), {}
for sent, number in ((signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGKILL, 1)):
    ends[sent.name] = run(lm, "lm", lm_flags, once_a_step_is_saved(number, sent))
    ends[f"after {sent.name}"] = checkpoint.steps(where / "lm" / "checkpoints")
ends["live"] = run(str(train_sae.__file__), "live", live_flags)
print(json.dumps(ends))
