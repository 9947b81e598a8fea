"""Bad model directories: each ends in one clear line that names file, field, what was found and what was expected."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import qwen_eqx
from damage import POINTER, TINY, Damage, fields, refuse, remove, write
from qwen_eqx import InputError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "model", max_shard_bytes=150_000)
    return tmp_path / "model"


CONFIG_CASES = {
    "missing": (remove("config.json"), r"config\.json"),
    "empty": (write("config.json", ""), r"config\.json"),
    "no-json": (write("config.json", "{'model_type': 'qwen2'}"), r"config\.json"),
    "no-object": (write("config.json", "[1, 2]"), r"config\.json: found a JSON list, expected an object"),
    "no-text": (write("config.json", b"\xff\xfe{"), r"config\.json"),
    "nested-deeply": (write("config.json", "[" * 100_000), r"config\.json"),
    "number-of-5000-digits": (write("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), r"config\.json"),
    "lfs-pointer": (write("config.json", POINTER), r"config\.json"),
    "other-architecture": (fields("config.json", model_type="llama"), "model_type: found 'llama', expected 'qwen2'"),
    "mixture-of-experts": (fields("config.json", model_type="qwen3_moe"), "model_type: found 'qwen3_moe'"),
    "no-architecture": (fields("config.json", model_type=...), "model_type: missing"),
    "no-width": (fields("config.json", hidden_size=...), "hidden_size: missing"),
    "float-for-int": (fields("config.json", hidden_size=64.0), r"hidden_size: found 64\.0"),
    "text-for-int": (fields("config.json", num_hidden_layers="4"), "num_hidden_layers: found '4'"),
    "true-for-int": (fields("config.json", num_key_value_heads=True), "num_key_value_heads: found True"),
    "int-for-bool": (fields("config.json", tie_word_embeddings=1), "tie_word_embeddings: found 1"),
    "negative": (fields("config.json", num_attention_heads=-4), "heads=-4"),
    "no-layers": (fields("config.json", num_hidden_layers=0), "layers=0"),
    "million-layers": (fields("config.json", num_hidden_layers=10**6), "layers=1000000"),
    "heads-of-kv-heads": (fields("config.json", num_key_value_heads=3), "heads=4 must be a multiple of kv_heads=3"),
    "odd-head": (fields("config.json", head_dim=15), "d_head=15"),
    "rope-scaling": (fields("config.json", rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling"),
    "rope-parameters": (
        fields("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        "rope_parameters",
    ),
    "sliding-window": (fields("config.json", use_sliding_window=True), "use_sliding_window"),
    "other-activation": (fields("config.json", hidden_act="gelu"), "hidden_act: found 'gelu', expected 'silu'"),
    "quantized": (fields("config.json", quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "zero-eps": (fields("config.json", rms_norm_eps=0), "norm_eps=0"),
    "huge-vocabulary": (fields("config.json", vocab_size=10**15), "vocab"),
    "huge-width": (fields("config.json", intermediate_size=10**12), r"mlp\.gate_proj|d_ff"),
}


@pytest.mark.parametrize(("damage", "message"), CONFIG_CASES.values(), ids=CONFIG_CASES)
def test_config(single: Path, damage: Damage, message: str):
    refuse(single, damage, message)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(directory / "model.safetensors", framework="np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def edit(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(directory: Path) -> None:
        arrays = tensors(directory)
        change(arrays)
        safetensors.numpy.save_file(arrays, directory / "model.safetensors")

    return damage


def poison(value: float, name: str = "model.layers.1.mlp.up_proj.weight") -> Damage:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][3, 5] = value

    return edit(change)


def header(content: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content)) + content + data


def truncate(name: str, keep: int) -> Damage:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:keep])


UP = "model.layers.1.mlp.up_proj.weight"
WEIGHT_CASES = {
    "missing": (remove("model.safetensors"), r"found neither, expected model\.safetensors or .*index\.json"),
    "empty": (write("model.safetensors", b""), r"model: model\.safetensors: found 0 bytes that do not open"),
    "truncated": (truncate("model.safetensors", 200_000), r"model\.safetensors: found 200000 bytes that do not open"),
    "truncated-header": (truncate("model.safetensors", 100), r"model\.safetensors: found 100 bytes"),
    "lfs-pointer": (write("model.safetensors", POINTER), r"model\.safetensors: found a Git LFS pointer.*git lfs pull"),
    "header-of-exabytes": (write("model.safetensors", b"\xff" * 64), r"model\.safetensors: found 64 bytes"),
    "header-no-json": (write("model.safetensors", header(b"not json")), r"model\.safetensors: found 16 bytes"),
    "offsets-beyond-the-file": (
        write("model.safetensors", header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"1234")),
        "that do not open",
    ),
    "missing-tensor": (edit(lambda arrays: arrays.pop(UP)), f"{UP}: missing, expected shape \\(144, 64\\)"),
    "missing-bias": (
        edit(lambda arrays: arrays.pop("model.layers.0.self_attn.q_proj.bias")),
        r"layers\.0\.self_attn\.q_proj\.bias: missing",
    ),
    "unexpected-tensor": (
        edit(lambda arrays: arrays.update(extra=np.zeros(3, np.float32))),
        r"model\.safetensors: extra: found a tensor this model has no place for",
    ),
    "one-layer-more": (
        edit(lambda arrays: arrays.update({UP.replace(".1.", ".4."): arrays[UP].copy()})),
        r"layers\.4\.mlp\.up_proj\.weight: found a tensor this model has no place for",
    ),
    "transposed": (
        edit(lambda arrays: arrays.update({UP: np.ascontiguousarray(arrays[UP].T)})),
        r"up_proj\.weight: found shape \(64, 144\), expected \(144, 64\)",
    ),
    "int-for-float": (
        edit(lambda arrays: arrays.update({UP: arrays[UP].astype(np.int32)})),
        r"up_proj\.weight: found dtype I32, expected one of BF16, F16, F32",
    ),
    "float64": (edit(lambda arrays: arrays.update({UP: arrays[UP].astype(np.float64)})), "found dtype F64"),
    "float8": (edit(lambda arrays: arrays.update({UP: arrays[UP].astype(ml_dtypes.float8_e4m3fn)})), "found dtype F8_E4M3"),
    "nan": (poison(np.nan), f"{UP}: found 1 values that are NaN or infinite"),
    "infinite": (poison(-np.inf, "model.embed_tokens.weight"), "embed_tokens.weight: found 1 values that are NaN"),
    "different-tied-head": (
        edit(lambda arrays: arrays.update({"lm_head.weight": np.zeros_like(arrays["model.embed_tokens.weight"])})),
        r"lm_head\.weight: found a head that differs",
    ),
    "untied-without-a-head": (fields("config.json", tie_word_embeddings=False), r"lm_head\.weight: missing"),
    "pickle": (
        lambda directory: (directory / "model.safetensors").rename(directory / "pytorch_model.bin"),
        r"found pytorch_model\.bin, expected model\.safetensors .*only safetensors are read",
    ),
    "a-directory": (
        lambda directory: (remove("model.safetensors")(directory), (directory / "model.safetensors").mkdir()),
        r"model\.safetensors: found",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), WEIGHT_CASES.values(), ids=WEIGHT_CASES)
def test_weights(single: Path, damage: Damage, message: str):
    refuse(single, damage, message)


def test_every_problem_is_in_one_error(single: Path):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays.pop("model.norm.weight")
        arrays["extra"] = np.zeros(2, np.float32)
        arrays[UP] = np.zeros((2, 2), np.float32)
        arrays["model.layers.2.mlp.up_proj.weight"] = np.zeros((144, 64), np.int8)

    damage = edit(change)
    refuse(single, damage, "4 problems: ")
    with pytest.raises(InputError) as caught:
        qwen_eqx.from_pretrained(single)
    for part in ("model.norm.weight: missing", "extra: found", "found shape (2, 2)", "found dtype I8"):
        assert part in str(caught.value)


def test_every_tensor_that_is_not_finite_is_listed(single: Path):
    poison(np.nan)(single)
    refuse(single, poison(np.inf, "model.embed_tokens.weight"), "2 problems: ")


def test_a_long_list_is_cut(single: Path):
    refuse(
        single, edit(lambda arrays: [arrays.pop(name) for name in list(arrays)[:20]]), "20 problems: .*; and 12 more$"
    )


def test_too_large_for_float16(single: Path):
    damage = edit(lambda arrays: arrays.update({UP: np.full((144, 64), 1e6, np.float32)}))
    refuse(single, damage, "found 9216 values that are NaN or infinite in float16", dtype="float16")


def shard(number: int) -> str:
    return f"model-{number:05}-of-00003.safetensors"


def swap(name: str) -> Damage:
    """Say in the index that one tensor lies in a file of that name."""

    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"][UP] = name
        (directory / INDEX).write_text(json.dumps(index))

    return damage


INDEX_CASES = {
    "no-json": (write(INDEX, "{"), r"index\.json: found .* expected JSON"),
    "nan": (write(INDEX, '{"weight_map": NaN}'), r"index\.json: found the constant NaN, expected JSON"),
    "lfs-pointer": (write(INDEX, POINTER), r"index\.json: found a Git LFS pointer"),
    "no-map": (fields(INDEX, weight_map=...), r"index\.json: weight_map: found None"),
    "list-for-map": (fields(INDEX, weight_map=[shard(1)]), r"index\.json: weight_map: found \["),
    "empty-map": (fields(INDEX, weight_map={}), "weight_map: found {}"),
    "parent": (swap("../secret.safetensors"), r"found '\.\./secret\.safetensors', expected the plain name"),
    "absolute": (swap("/etc/secret.safetensors"), "found '/etc/secret.safetensors', expected the plain name"),
    "subdirectory": (swap("sub/model.safetensors"), "expected the plain name"),
    "backslash": (swap("..\\model.safetensors"), "expected the plain name"),
    "hidden-null": (swap("model\0.safetensors"), "expected the plain name"),
    "newline": (swap("model.safetensors\n"), "expected the plain name"),
    "other-suffix": (swap("pytorch_model.bin"), "found 'pytorch_model.bin', expected the plain name"),
    "number-for-name": (swap(3), "found 3, expected the plain name"),  # type: ignore[arg-type]
    "missing-shard": (remove(shard(2)), "model: model-00002-of-00003.safetensors: found no such file"),
    "truncated-shard": (truncate(shard(2), 5000), "model: model-00002-of-00003.safetensors: found 5000 bytes"),
    "lfs-shard": (write(shard(3), POINTER), "model: model-00003-of-00003.safetensors: found a Git LFS pointer"),
    "wrong-shard": (swap(shard(1)), f"model-00001-of-00003.safetensors: {UP}: missing, expected by {INDEX}"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), INDEX_CASES.values(), ids=INDEX_CASES)
def test_index(sharded: Path, damage: Damage, message: str):
    refuse(sharded, damage, message)
