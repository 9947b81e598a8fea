"""The house plan as a test: which file may import which (docs/dataflow.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Inside a package, a file imports only files that stand before it here: folders import folders above them, files of a
# folder the files above them in it. A folder's own `__init__` stands behind its files, the package's is last.
ORDER = {
    "qwen_eqx": {
        "": ["errors", "files", "shown", "sharding"],
        "text": ["chat", "ids", "tokenizer"],
        "model": [
            "config", "sites", "layers", "rope", "cache", "causal", "attention", "edits", "room", "rows", "qwen", "effect",
            "frozen",
        ],
        "reading": ["labelled", "lens", "attribution", "gradients", "patching", "paths"],
        "generation": [
            "sample", "memory", "buffer", "prompts", "options", "progress", "engine", "generate", "seats", "scheduler",
            "score", "search",
        ],
        "weights": ["hub", "hf"],
        "training": ["products", "loss", "lora", "sharding", "step", "loop"],
    },
    "arc": {
        "": [
            "errors", "files", "drawing", "grid", "task", "records", "encode", "spans", "augment", "prompt", "parse", "ask",
            "vote", "submission", "score", "family", "cells", "properties", "families_whole", "families_objects",
            "families_cells", "generators", "data", "canvas", "render",
        ],
    },
    "sae": {
        "": ["errors", "files", "storage", "shown"],
        "codes": ["across", "select", "products"],
        "forms": [
            "losses", "objective", "abstract", "ksparse", "relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated",
            "skip", "crosscoder", "clt", "clamped", "transcoders",
        ],
        "data": [
            "plan", "rows", "shards", "store", "writer", "shuffle", "prefetch", "statistics", "buffer", "synthetic",
        ],
        "training": ["config", "state", "sharding", "step", "loop", "sweep", "checkpoint"],
        "formats": [
            "torchzip", "description", "saelens", "sparsify", "dictionary_learning", "gemma_scope", "qwen_scope", "load",
            "circuit_tracer", "sets",
        ],
        "evaluation": ["metrics", "codes", "matching", "probing", "survey", "neighbours", "gallery"],
    },
    "qwen_lab": {
        "": [
            "errors", "allocation", "bounds", "flags", "recipes", "stopping", "files", "extending", "locks", "provenance",
            "hosts", "joining", "cli", "meshes", "claims", "tracking", "wording", "prompts", "completions", "corpus",
            "labels", "places", "texts", "loading", "marks", "passages", "seen", "prose", "puzzles", "corpora", "choosing",
            "rows", "space", "reading", "meter", "writing", "store_report", "extraction", "splicing", "sources",
            "evaluation", "lens", "dashboards", "figures", "heat",
            "settings", "sweeps", "runs", "jobs", "answering", "predictions", "sheets", "solve_report",
            "timelines", "watching", "lessons", "exactness", "features", "answers", "invariance", "pages",
            "rules", "lm_settings", "cards", "lm_runs", "exams", "stages", "pipeline_report",
        ],
        "circuits": [
            "nodes", "influence", "neuronpedia", "page", "graph", "room", "replacement", "rows", "tracing", "intervening",
            "puzzles", "feature_pages",
        ],
    },
}  # fmt: skip
COMMANDS = sorted((ROOT / "experiments").glob("*.py"))
FORBIDDEN = {
    "qwen_eqx": {"arc", "sae", "qwen_lab"},
    "arc": {"qwen_eqx", "sae", "qwen_lab", "jax", "equinox"},
    "sae": {"qwen_eqx", "arc", "qwen_lab"},
    "qwen_lab": {path.stem for path in COMMANDS},
}
NEVER = {"torch", "transformers", "pickle"}


def home(package: str) -> Path:
    """The folder that a package lies in."""
    return ROOT / "experiments" if package == "qwen_lab" else ROOT


def is_module(name: str) -> bool:
    place = home(name.partition(".")[0]) / name.replace(".", "/")
    return place.with_suffix(".py").exists() or place.is_dir()


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            whole = {part for part in parts if not is_module(part)}  # a name of the folder itself, not a file in it
            names |= parts | ({node.module} if whole else set())
    return names


def rooms(package: str) -> list[str]:
    """Every file of a package as its dotted name, in the order in which they may be imported."""
    names = []
    for folder, files in ORDER[package].items():
        names += [f"{folder}.{name}".lstrip(".") for name in files] + ([folder] if folder else [])
    return [*names, package]


def room(package: str, path: Path) -> str:
    inside = path.relative_to(home(package) / package).with_suffix("").parts
    name = ".".join(part for part in inside if part != "__init__")
    return name or package


FILES = [(package, path) for package in ORDER for path in sorted((home(package) / package).rglob("*.py"))]


@pytest.mark.parametrize(
    ("package", "path"), FILES, ids=lambda value: value if isinstance(value, str) else str(value.relative_to(ROOT))
)
def test_arrows_point_one_way(package: str, path: Path):
    order, here = rooms(package), room(package, path)
    assert here in order, f"{here} is a new room: give it a place in the order"
    for name in imported_modules(path):
        root, _, rest = name.partition(".")
        assert root not in FORBIDDEN[package] | NEVER, f"{here} must not import {name}"
        if root == package and rest in order and rest != here:
            assert order.index(rest) < order.index(here), f"{here} imports {name}, which stands after it"


@pytest.mark.parametrize("package", ORDER)
def test_no_room_is_named_that_does_not_exist(package: str):
    there = {room(package, path) for path in (home(package) / package).rglob("*.py")}
    assert set(rooms(package)) == there


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_no_command_imports_another(path: Path):
    """What two of them need lives in qwen_lab; one of them is made of others."""
    made_of = {"transform_dataset", "extract", "train_sae", "evaluate_sae"} if path.stem == "pipeline" else set()
    roots = {name.partition(".")[0] for name in imported_modules(path)}
    assert roots & {command.stem for command in COMMANDS} == made_of


def test_arc_loads_without_jax():
    code = "import sys, arc; assert 'jax' not in sys.modules, 'importing arc loaded JAX'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
