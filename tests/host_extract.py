"""Runs extract.py in several processes: `python host_extract.py WHERE FLAGS` prints what they exit with, as JSON.

One process writes WHERE/whole, two WHERE/together, four WHERE/four. Of two that begin WHERE/killed one dies at its first
shard; three go on. Two are told otherwise in WHERE/other.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import forks
from ports import free_port

where, flags = Path(sys.argv[1]), sys.argv[2:]


def run(name: str, processes: int, count: Callable[[], None] = forks.never, last: tuple[str, ...] = ()) -> list[int]:
    """What each exits with; `count` is the last one's, and so are the flags `last`."""
    common = [*flags, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    children = []
    for number in range(processes):
        own = [*common, "--process-id", str(number), *(last if number == processes - 1 else ())]
        children.append(forks.start(own, str(where / name), count if number == processes - 1 else forks.never))
    return [forks.end(child) for child in children]


def at_its_first_shard() -> None:
    """Ends the process that holds the second share once a shard of its own stands."""
    if (where / "killed" / "shards" / "000001.json").exists():
        os.kill(os.getpid(), 9)


ends = {"whole": run("whole", 1), "together": run("together", 2), "four": run("four", 4)}
ends["begun"] = run("killed", 2, at_its_first_shard)
ends["left"] = sorted(path.name for path in (where / "killed" / "shards").glob("*.json"))  # pyright: ignore[reportArgumentType]
ends["killed"] = run("killed", 3)
ends["other"] = run("other", 2, last=("--seed", "1"))
print(json.dumps(ends))
