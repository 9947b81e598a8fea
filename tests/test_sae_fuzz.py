"""Any JSON value in any field of any file that `sae` reads: a load, or one line of its own error."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae.training import checkpoint

FIXTURES = Path(__file__).parent / "fixtures" / "sae"
DICTIONARIES = [
    *(f"saelens/{path.name}" for path in sorted((FIXTURES / "saelens").iterdir())),
    *(f"dictionary_learning/{path.name}" for path in sorted((FIXTURES / "dictionary_learning").iterdir())),
    "sparsify/autoencoder/layers.3",
    "sparsify/transcoder/layers.3",
]
STATE = {"a": jnp.arange(3.0), "key": jax.random.key(3)}
Keys = tuple[str | int, ...]


def legacy(where: Path) -> None:
    """As SAELens wrote it before version 6."""
    shutil.copytree(FIXTURES / "saelens" / "topk", where)
    config = json.loads((where / "cfg.json").read_text())
    config |= {"metadata": None, "activation_fn": "topk", "activation_fn_kwargs": {"k": 3}, "hook_point": "x"}
    (where / "cfg.json").write_text(json.dumps(config))


def crosscoder(where: Path) -> None:
    module = sae.Crosscoder.init(sites=2, d_model=3, d_sae=8, k=2, key=jax.random.key(0))
    module = module.with_threshold(jax.random.normal(jax.random.key(1), (20, 2, 3)))
    sae.save(module, where, {"hook_name": "x"}, density=np.ones(8, np.float32))


def store(where: Path) -> None:
    manifest = sae.Manifest(
        "m", None, "-", "-", ("x", "y"), "float32", 2, 0, sae.Plan(items=3, items_per_shard=2), {"a": {"b": [1]}}, {"n": "1"}
    )  # fmt: skip
    writer = sae.StoreWriter.create(where, manifest)
    for shard in writer.missing:
        items = writer.plan.items_of(shard)
        rows = [sae.Rows.of_sequence([1, 2], [3], item, np.ones((2, 1, 2), np.float32)) for item in items]
        whole = sae.Rows.concatenate(rows)
        writer.write_shard(shard, whole, [{"text": "12", "outcome": "wrong"} for _ in items])


def read_store(where: Path) -> None:
    found = sae.ActivationStore.open(where)
    found.verify()
    (
        found.column("item"),
        found[:],
        list(found.batches(2)),
        found.items,
        found.missing,
        repr(found),
        repr(found.manifest),
    )
    sae.StoreWriter.create(where, found.manifest)


def read_checkpoint(where: Path) -> None:
    _, cursor, step = checkpoint.load(where, STATE)
    assert isinstance(cursor, dict)
    assert step == 1


def read_dictionary(where: Path) -> None:
    loaded = sae.load_with_metadata(where)
    assert isinstance(loaded.metadata, dict)
    repr(loaded)


Source = tuple[Callable[[Path], object], str, Callable[[Path], None]]  # writes it, its JSON file, reads it
SOURCES: dict[str, Source] = {
    **{
        name: (
            lambda where, name=name: shutil.copytree(FIXTURES / name, where),
            "config.json" if name.startswith("dictionary_learning") else "cfg.json",
            read_dictionary,
        )
        for name in DICTIONARIES
    },
    "legacy": (legacy, "cfg.json", read_dictionary),
    "crosscoder": (crosscoder, "cfg.json", read_dictionary),
    "manifest": (store, "manifest.json", read_store),
    "sidecar": (store, "shards/000000.json", read_store),
    "checkpoint": (lambda where: checkpoint.save(where, 1, STATE, {"row": 3}), "00000001/state.json", read_checkpoint),
}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.0, 2.5, 10**400, 1e400, float("nan"), "", "3", "²", "6²", "two\nlines", "x" * 3000,
    "6" * 5000, "\ud800", [], [[]], [4, 16], ["x", "y"], ["two\nlines"], [None], [{}], {}, {"k": []}, {"two\nlines": 1},
    {"sae_lens_version": {}},
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


def places(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The value itself, and everything in it."""
    yield keys
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*keys, key))


def replaced(value: Any, keys: Keys, by: Any) -> Any:
    """The value with `by` at that place; ... removes it."""
    if not keys:
        return {} if by is ... else by
    copy = value.copy()
    if by is ... and len(keys) == 1:
        del copy[keys[0]]
    else:
        copy[keys[0]] = replaced(value[keys[0]], keys[1:], by)
    return copy


@cache
def written(name: str, base: Path) -> tuple[Path, Path, Any]:
    """A directory with this source, its JSON file, and what the file holds."""
    where = base / name.replace("/", "-")
    SOURCES[name][0](where)
    path = where / SOURCES[name][1]
    return where, path, json.loads(path.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check(name: str, base: Path, keys: Keys, by: Any) -> None:
    """Loads, or refuses in one line that names a file."""
    where, path, content = written(name, base)
    path.write_text(json.dumps(replaced(content, keys, by)))
    said = ""
    try:
        SOURCES[name][2](where)
    except sae.InputError as error:
        said = str(error)
    finally:
        path.write_text(json.dumps(content))
    assert "\n" not in said
    assert not said or str(base) in said
    assert len(said) < 1500


@pytest.mark.parametrize("name", SOURCES)
def test_every_field_with_every_kind_of_value(name: str, base: Path):
    SOURCES[name][2](written(name, base)[0])  # whole, it loads
    for keys in places(written(name, base)[2]):
        for by in (..., *ODD):
            check(name, base, keys, by)


@given(st.data())
@settings(max_examples=200)
def test_any_value_anywhere(base: Path, data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(SOURCES)))
    keys = data.draw(st.sampled_from(list(places(written(name, base)[2]))))
    check(name, base, keys, data.draw(JSON))
