"""The house plan as a test: which file may import which (docs/dataflow.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Inside a package, a file imports only files that stand before it here.
ORDER = {
    "qwen_eqx": [
        "errors", "files", "chat", "tokenizer", "config", "layers", "rope", "attention", "cache", "buffer", "sites", "edits",
        "model", "sample", "memory", "engine", "generate", "scheduler", "score", "search", "sharding", "hub", "hf", "train",
        "__init__",
    ],
    "arc": [
        "errors", "files", "grid", "task", "records", "data", "encode", "augment", "prompt", "parse", "ask", "vote",
        "submission", "score", "family", "cells", "families_whole", "families_objects", "generators",
        "canvas", "render", "__init__",
    ],
    "sae": [
        "errors", "files", "sparse", "abstract", "models", "losses", "objectives", "state", "step", "buffer", "plan",
        "store", "metrics", "train", "checkpoint", "synthetic", "torchzip", "foreign", "saelens", "formats", "survey",
        "report", "__init__",
    ],
}  # fmt: skip
FORBIDDEN = {"qwen_eqx": {"arc", "sae"}, "arc": {"qwen_eqx", "sae", "jax", "equinox"}, "sae": {"qwen_eqx", "arc"}}
NEVER = {"torch", "transformers", "pickle"}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [(package, path) for package in ORDER for path in sorted((ROOT / package).glob("*.py"))]


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_arrows_point_one_way(package: str, path: Path):
    order = ORDER[package]
    assert path.stem in order, f"{path.name} is a new room: give it a place in the order"
    for name in imported_modules(path):
        root, *rest = name.split(".")
        assert root not in FORBIDDEN[package] | NEVER, f"{path.name} must not import {name}"
        if root == package and rest and rest[0] in order:
            assert order.index(rest[0]) < order.index(path.stem), f"{path.name} imports {name}, which stands after it"


def test_arc_loads_without_jax():
    code = "import sys, arc; assert 'jax' not in sys.modules, 'importing arc loaded JAX'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
