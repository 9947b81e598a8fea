"""extract.py killed anywhere, and given again until it gets through: the bytes are an uninterrupted run's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ports import with_devices
from running import ROOT, short_tasks
from sae import storage

FLAGS = "--mode forward --limit 3 --layers 1 --items-per-shard 1 --model tiny-random --tasks"


def killed(where: Path, location: str, step: int, kills: int) -> int:
    """How many counted deaths it took; raises unless the stores are an uninterrupted run's."""
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(1), "JAX_COMPILATION_CACHE_DIR": str(where / "xla")}
    own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": f"{ROOT}:{ROOT}/experiments"}
    harness = [sys.executable, str(ROOT / "tests" / "kill_extract.py"), str(where / "whole"), location]
    command = [*harness, str(step), str(kills), *FLAGS.split(), str(short_tasks(where))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, cwd=where, timeout=500)
    assert done.returncode == 0, done.stderr
    expected = contents(str(where / "whole"))
    assert sum(name.startswith("shards/") for name in expected) == 6
    for name in ("counted", "killed"):
        assert contents(f"{location}/{name}") == expected
    return json.loads(done.stdout)["counted"]


def contents(location: str) -> dict[str, bytes]:
    """Every file of a store but those that say when it was made."""
    home, found = storage.place(location), {}
    for prefix in ("", "shards/"):
        folder = home / prefix.rstrip("/") if prefix else home
        names = [name for name, size in folder.sizes().items() if size is not None]
        found |= {f"{prefix}{name}": (folder / name).read() for name in names}
    return {name: data for name, data in found.items() if name not in ("run.json", "metrics.jsonl")}


def test_on_a_disk(tmp_path: Path):
    assert killed(tmp_path, str(tmp_path), 15, 1) >= 2


@pytest.mark.filterwarnings("ignore")
def test_in_s3(bucket: str, tmp_path: Path):
    """Few deaths: each start of a process costs a second, and each request a few milliseconds."""
    assert killed(tmp_path, bucket, 45, 1) >= 1
