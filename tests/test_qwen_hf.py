"""Hugging Face directories: what goes out comes back, the embedded model, the hub's cache, and nothing half-written."""

import importlib.util
import json
import shutil
from pathlib import Path

import equinox as eqx
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_eqx
import strategies
from qwen_eqx import PRESETS, InputError, Qwen, QwenConfig
from qwen_eqx.weights.hf import DTYPES, load_model, name_table, save_pretrained, skeleton
from qwen_eqx.weights.hub import EMBEDDED, embedded_models

TINY = EMBEDDED / "tiny-random"
SMALL = QwenConfig("qwen2", 31, 12, 2, 4, 2, 6, 20, 64, tied=False)


def random_model(config: QwenConfig, dtype: str = "float32", seed: int = 0) -> Qwen:
    """Every weight random, in NumPy: quicker than one compilation per shape."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype)), skeleton(config, jnp.dtype(dtype))
    )


def weights(model: Qwen) -> dict[str, np.ndarray]:
    """A small model's arrays by path."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def assert_same(found: Qwen, expected: Qwen, dtype: str | None = None):
    assert found.config == expected.config
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        expected_array = array if dtype is None else array.astype(jnp.dtype(dtype))
        assert ours[path].dtype == expected_array.dtype
        np.testing.assert_array_equal(ours[path], expected_array, err_msg=path)


@given(config=strategies.configs(), dtype=st.sampled_from(DTYPES), shard=st.sampled_from([1, 700, 10**9]))
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, config: QwenConfig, dtype: str, shard: int):
    directory = tmp_path_factory.mktemp("saved")
    model = random_model(config, dtype)
    save_pretrained(model, None, directory, max_shard_bytes=shard)
    assert_same(load_model(directory, dtype=dtype), model)
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


@given(stored=st.sampled_from(DTYPES), asked=st.sampled_from(DTYPES))
@settings(max_examples=9)
def test_any_stored_dtype_loads_as_any_asked(tmp_path_factory, stored: str, asked: str):
    directory = tmp_path_factory.mktemp("saved")
    model = random_model(SMALL, stored)
    save_pretrained(model, None, directory)
    assert_same(load_model(directory, dtype=asked), model, asked)


@given(config=strategies.configs())
def test_the_table_names_every_array_once(config: QwenConfig):
    model = skeleton(config, jnp.dtype(jnp.bfloat16))
    table = name_table(model)
    assert len(set(table.values())) == len(table) == len(jax.tree.leaves(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == config.parameters


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_build_as_skeletons(name: str):
    model = skeleton(PRESETS[name], jnp.dtype(jnp.bfloat16))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == PRESETS[name].parameters
    assert ("lm_head.weight" in name_table(model)) is not PRESETS[name].tied
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))


def test_what_a_saved_directory_holds(tmp_path: Path):
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "new" / "deep")
    saved = tmp_path / "new" / "deep"
    assert sorted(path.name for path in saved.iterdir()) == sorted(path.name for path in TINY.iterdir())
    for path in saved.iterdir():
        assert path.read_bytes() == (TINY / path.name).read_bytes()
        assert path.stat().st_mode & 0o777 == (saved / "config.json").stat().st_mode & 0o777
    with safetensors.safe_open(saved / "model.safetensors", framework="np") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118


def test_shards_stay_below_the_size_and_the_index_counts_them(tmp_path: Path):
    save_pretrained(random_model(SMALL), None, tmp_path, max_shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    sizes = [sum(array.nbytes for array in safetensors.numpy.load_file(path).values()) for path in files]
    assert max(sizes) <= 2000
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * SMALL.parameters


def test_another_layout_is_replaced_not_shadowed(tmp_path: Path):
    first, second = random_model(SMALL, seed=1), random_model(SMALL, seed=2)
    (tmp_path / "notes.txt").write_text("mine")
    for model, size in ((first, 10**9), (second, 2000), (first, 10**9), (second, 700)):
        save_pretrained(model, None, tmp_path, max_shard_bytes=size)
        assert_same(load_model(tmp_path, dtype="float32"), model)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = random_model(SMALL, seed=1)
    save_pretrained(old, None, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full_disk(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments, **named)

    real = safetensors.numpy.save_file
    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(random_model(SMALL, seed=2), None, tmp_path, max_shard_bytes=2000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_cut_between_renames_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half old, half new weights under an old config.json would open and be wrong."""
    save_pretrained(random_model(SMALL, seed=1), None, tmp_path, max_shard_bytes=2000)
    done = []

    def cut(temporary: Path, path: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(path)
        real(temporary, path)

    real = qwen_eqx.weights.hf.give_name
    monkeypatch.setattr(qwen_eqx.weights.hf, "give_name", cut)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(random_model(SMALL, seed=2), None, tmp_path, max_shard_bytes=2000)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_tied_checkpoint_may_repeat_its_embedding(tmp_path: Path):
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    with safetensors.safe_open(path, framework="np") as tensors:
        arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(arrays, path)
    assert_same(load_model(tmp_path / "model"), load_model(TINY))
    arrays["lm_head.weight"] = arrays["lm_head.weight"] * arrays["lm_head.weight"].dtype.type(2)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(InputError, match=r"lm_head\.weight: found a head that differs from the embedding"):
        load_model(tmp_path / "model")


def test_the_embedded_model():
    assert embedded_models() == ["tiny-arc", "tiny-random"]
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    assert model.dtype == jnp.bfloat16
    assert model.config.vocab == tokenizer.vocab_size == 512
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 500_000


def test_the_embedded_model_is_made_bit_for_bit(tmp_path: Path):
    spec = importlib.util.find_spec("make_tiny_random")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make(tmp_path)
    for path in TINY.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_name_is_embedded_before_it_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "mine")
    (tmp_path / "tiny-random").mkdir()  # empty: opening it would fail
    assert_same(qwen_eqx.from_pretrained("tiny-random")[0], load_model(TINY))
    assert_same(qwen_eqx.from_pretrained("mine")[0], load_model(TINY))
    assert_same(qwen_eqx.from_pretrained(tmp_path / "mine")[0], load_model(TINY))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(qwen_eqx.from_pretrained("~/mine", dtype="float32")[0], load_model(TINY, dtype=jnp.float32))


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of huggingface_hub's layout; conftest has told huggingface_hub that it is offline."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    cache = tmp_path / "hub-cache"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def put_in_cache(cache: Path, source: Path, without: tuple[str, ...] = ()) -> Path:
    repo = cache / "models--somebody--a-model"
    snapshot = repo / "snapshots" / REVISION
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    shutil.copytree(source, snapshot, ignore=lambda _, names: [name for name in names if name in without])
    return snapshot


def test_a_cached_hub_model_opens_without_a_network(hub_cache: Path):
    put_in_cache(hub_cache, TINY)
    for revision in (None, "main", REVISION):
        model, tokenizer = qwen_eqx.from_pretrained("somebody/a-model", revision=revision)
        assert_same(model, load_model(TINY))
        assert tokenizer.vocab_size == 512


def test_nothing_cached_and_no_network(hub_cache: Path):
    with pytest.raises(InputError) as caught:
        qwen_eqx.from_pretrained("somebody/a-model", revision="v1")
    for part in ("somebody/a-model", "v1", str(hub_cache), "hf download somebody/a-model --revision v1", "tiny-random"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_partial_snapshot_is_no_success(hub_cache: Path, missing: str):
    put_in_cache(hub_cache, TINY, without=(missing,))
    with pytest.raises(InputError, match="partial snapshot") as caught:
        qwen_eqx.from_pretrained("somebody/a-model")
    assert missing in str(caught.value)
    assert "hf download somebody/a-model" in str(caught.value)


def test_a_snapshot_lacks_a_shard(hub_cache: Path, tmp_path: Path):
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    save_pretrained(model, tokenizer, tmp_path / "sharded", max_shard_bytes=100_000)
    shard = sorted((tmp_path / "sharded").glob("model-*"))[1].name
    put_in_cache(hub_cache, tmp_path / "sharded", without=(shard,))
    with pytest.raises(InputError, match=f"partial snapshot .* without {shard}"):
        qwen_eqx.from_pretrained("somebody/a-model")


def test_a_model_with_a_changed_array_is_not_saved(tmp_path: Path):
    model = random_model(SMALL)
    changed = eqx.tree_at(lambda tree: tree.norm.weight, model, jnp.zeros(5))
    with pytest.raises(InputError, match=r"norm\.weight: found float32\(5,\), expected float32\(12,\)"):
        save_pretrained(changed, None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_larger_than_the_model_is_not_saved(tmp_path: Path):
    _, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    with pytest.raises(InputError, match="tokenizer: found id 511, expected ids below vocab=31"):
        save_pretrained(random_model(SMALL), tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()
