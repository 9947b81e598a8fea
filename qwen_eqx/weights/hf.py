"""Hugging Face directories in and out: one table of names, every problem listed at once, nothing half-written."""

import contextlib
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from qwen_eqx import sharding
from qwen_eqx.errors import DiskFull, InputError
from qwen_eqx.files import fsync_directory, give_name, is_lfs_pointer, local_path, temporary_name, writing
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.room import free_device_bytes
from qwen_eqx.text.tokenizer import Tokenizer
from qwen_eqx.weights.hub import CONFIG, INDEX, WEIGHTS, locate, weight_files

DTYPES = ("bfloat16", "float16", "float32")
_STORED = {"BF16", "F16", "F32"}  # safetensors' names of the same
_INF = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}}  # all exponent bits: infinite or NaN
_LISTED = 8  # problems spelled out in one message
_COMPARED = 4096  # rows of a head and an embedding that are compared at once
MAX_SHARD_BYTES = 5_000_000_000
HEAD = "lm_head.weight"
_BLOCK_TABLE = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn.q.weight",
    "self_attn.q_proj.bias": "attn.q.bias",
    "self_attn.k_proj.weight": "attn.k.weight",
    "self_attn.k_proj.bias": "attn.k.bias",
    "self_attn.v_proj.weight": "attn.v.weight",
    "self_attn.v_proj.bias": "attn.v.bias",
    "self_attn.o_proj.weight": "attn.o.weight",
    "self_attn.q_norm.weight": "attn.q_norm.weight",
    "self_attn.k_norm.weight": "attn.k_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "mlp.gate_proj.weight": "mlp.gate.weight",
    "mlp.up_proj.weight": "mlp.up.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
}


def from_pretrained(
    name_or_dir: str | Path, *, revision: str | None = None, dtype: Any = jnp.bfloat16, mesh: Mesh | str | None = None
) -> tuple[Qwen, Tokenizer]:
    """Model and tokenizer of an embedded name, a local Hugging Face directory or a hub id, tried in that order.

    On a mesh, or one that `make_mesh` understands, every device reads its own part of the weights.
    """
    mesh = None if mesh is None else sharding.make_mesh(mesh)
    directory = locate(name_or_dir, revision)
    config = QwenConfig.from_file(directory / CONFIG)
    tokenizer = Tokenizer.from_directory(directory, vocab_size=config.vocab)  # before the weights: quick to refuse
    return load_model(directory, dtype=dtype, mesh=mesh), tokenizer


def load_model(directory: str | Path, *, dtype: Any = jnp.bfloat16, mesh: Mesh | None = None) -> Qwen:
    """The model of a directory with config.json and safetensors; every problem with its weights in one error."""
    directory = local_path(directory, "directory")
    if (wanted := _dtype_name(dtype)) not in DTYPES:
        raise InputError(f"dtype: found {wanted}, expected one of {', '.join(DTYPES)}")
    model = skeleton(QwenConfig.from_file(directory / CONFIG), jnp.dtype(wanted))
    table = name_table(model)
    headers, broken, problems = _read_headers(directory)
    # a file that does not open is one problem, not one for each tensor it should have held
    absent = [] if broken else [name for name in table if name not in headers]
    problems += [f"{name}: missing, expected shape {_at(model, table[name]).shape}" for name in absent]
    problems = broken + problems + _compare(headers, table, model)
    _raise_all(directory, problems)
    places: dict[str, NamedSharding | None] = dict.fromkeys(table)
    if mesh is not None:
        sharding.check_fits(model, mesh, free_device_bytes(mesh.local_devices))
        sharding.say_what_is_not_split(model.config, mesh)
        placed = sharding.shardings(model, mesh)
        places = {name: _at(placed, path) for name, path in table.items()}
    loaded = _load(directory, headers, places, jnp.dtype(wanted))
    return eqx.tree_at(lambda tree: [_at(tree, table[name]) for name in loaded], model, list(loaded.values()))


def save_pretrained(
    model: Qwen, tokenizer: Tokenizer | None, directory: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a directory that `from_pretrained` and transformers' AutoModelForCausalLM open.

    Everything is written under temporary names first; then an old config.json goes, the files take their names and the
    new config.json comes last, so a directory that is cut short is one that does not open.
    """
    directory = local_path(directory, "directory")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"directory: found a file at {directory}, expected a directory or nothing")
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes: found {max_shard_bytes}, expected at least 1")
    _check_saveable(model, tokenizer)
    _make(directory)
    written: dict[Path, Path] = {}  # final name -> temporary name
    try:
        for path, content in _contents(model, tokenizer, directory, max_shard_bytes):
            if path.is_dir():
                raise InputError(f"{path}: found a directory, expected a file of an earlier save or nothing")
            written[path] = temporary_name(path)
            _write(written[path], content, path)
        (directory / CONFIG).unlink(missing_ok=True)
        for path, temporary in written.items():
            give_name(temporary, path)
            fsync_directory(directory)
        _remove_stale_weights(directory, {path.name for path in written})
    except BaseException:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
        raise


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(directory, 4096, 0) from None
        raise InputError(f"directory: found {directory} ({error.strerror}), expected a place to write in") from None


def _write(temporary: Path, content: bytes | dict[str, np.ndarray], path: Path) -> None:
    with writing(path, len(content) if isinstance(content, bytes) else sum(array.nbytes for array in content.values())):
        temporary.write_bytes(content if isinstance(content, bytes) else b"")
        if isinstance(content, bytes):
            return
        mode = temporary.stat().st_mode
        try:
            safetensors.numpy.save_file(content, temporary, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # its one class for all that a disk can do
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None
        temporary.chmod(mode)  # safetensors makes files that only their owner can read


def skeleton(config: QwenConfig, dtype: jnp.dtype) -> Qwen:
    """The model with shapes for arrays: any size, in no memory."""
    return eqx.filter_eval_shape(lambda: Qwen.init(config, key=jax.random.key(0), dtype=dtype))


def name_table(model: Qwen) -> dict[str, str]:
    """Hugging Face name -> path in the model, for the arrays this model has."""
    table = {"model.embed_tokens.weight": "embed.table", "model.norm.weight": "norm.weight", HEAD: "head.weight"}
    for layer in range(len(model.blocks)):
        for name, path in _BLOCK_TABLE.items():
            table[f"model.layers.{layer}.{name}"] = f"blocks.{layer}.{path}"
    return {name: path for name, path in table.items() if _at(model, path) is not None}


def _at(tree: Any, path: str) -> Any:
    for step in path.split("."):
        if tree is None:
            return None
        tree = tree[int(step)] if step.isdigit() else getattr(tree, step)
    return tree


def _dtype_name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)


_Header = tuple[str, str, tuple[int, ...]]  # file, stored dtype, shape


def _read_headers(directory: Path) -> tuple[dict[str, _Header], list[str], list[str]]:
    """What the weight files say they hold, without reading the data; which do not open; what the index says wrongly."""
    headers: dict[str, _Header] = {}
    broken: list[str] = []
    problems: list[str] = []
    for file, promised in weight_files(directory).items():
        path = directory / file
        if (wrong := _unreadable(path)) is not None:
            broken.append(f"{file}: {wrong}")
            continue
        with safetensors.safe_open(path, framework="np") as tensors:
            names = set(tensors.keys())
            for name in sorted(names if promised is None else names & promised):
                part = tensors.get_slice(name)
                headers[name] = (file, part.get_dtype(), tuple(part.get_shape()))
        if promised is not None:
            problems += [f"{file}: {name}: missing, expected by {INDEX}" for name in sorted(promised - names)]
            problems += [
                f"{file}: {name}: found a tensor that {INDEX} does not list" for name in sorted(names - promised)
            ]
    return headers, broken, problems


def _unreadable(path: Path) -> str | None:
    try:
        with open(path, "rb") as handle:
            if is_lfs_pointer(handle.read(64)):
                return "found a Git LFS pointer, expected the data; run `git lfs pull` in that directory"
        with safetensors.safe_open(path, framework="np"):
            return None
    except FileNotFoundError:
        return "found no such file, expected a shard"
    except (OSError, safetensors.SafetensorError) as error:
        return f"found {path.stat().st_size} bytes that do not open ({error}), expected a whole safetensors file"


def _compare(headers: dict[str, _Header], table: dict[str, str], model: Qwen) -> list[str]:
    problems = []
    for name, (file, stored, shape) in headers.items():
        if stored not in _STORED:
            problems.append(f"{file}: {name}: found dtype {stored}, expected one of {', '.join(sorted(_STORED))}")
        if name == HEAD and name not in table:
            continue  # a tied model's second copy of the embedding: compared when the data is read
        if name not in table:
            problems.append(f"{file}: {name}: found a tensor this model has no place for")
        elif shape != (expected := _at(model, table[name]).shape):
            problems.append(f"{file}: {name}: found shape {shape}, expected {expected}")
    return problems


def _load(
    directory: Path, headers: dict[str, _Header], places: dict[str, NamedSharding | None], dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """Read, cast and check every tensor, one at a time: the peak is the model and one tensor, or one device's part."""
    loaded: dict[str, jax.Array] = {}
    problems: list[str] = []
    for file in dict.fromkeys(file for file, _, _ in headers.values()):
        with safetensors.safe_open(directory / file, framework="np") as tensors:
            for name in (name for name, header in headers.items() if header[0] == file and name in places):
                loaded[name], bad = _placed(tensors, name, headers[name][2], places[name], dtype)
                if bad:
                    problems.append(f"{file}: {name}: found {bad} values that are NaN or infinite in {dtype.name}")
    if HEAD in headers and HEAD not in places:
        problems += _compare_tied_head(directory, headers)
    _raise_all(directory, problems)
    return loaded


def _placed(
    tensors: Any, name: str, shape: tuple[int, ...], place: NamedSharding | None, dtype: jnp.dtype
) -> tuple[jax.Array, int]:
    """One tensor where it belongs, and how many values are not finite; a part is read once, for all who hold it."""

    def cast(array: np.ndarray) -> Float[np.ndarray, "..."]:
        with np.errstate(over="ignore"):  # too large for float16 becomes infinite, which is reported
            return array.astype(dtype, copy=False)

    if place is None:
        array = cast(tensors.get_tensor(name))
        return jnp.asarray(array), _not_finite(array)
    wanted = place.addressable_devices_indices_map(shape)
    parts: dict[Any, jax.Array] = {}
    bad = 0
    for index in {str(index): index for index in wanted.values()}.values():
        part = cast(tensors.get_slice(name)[index])
        bad += _not_finite(part)
        parts |= {device: jax.device_put(part, device) for device, held in wanted.items() if held == index}
    return jax.make_array_from_single_device_arrays(shape, place, [parts[device] for device in wanted]), bad


def _compare_tied_head(directory: Path, headers: dict[str, _Header]) -> list[str]:
    names = (HEAD, "model.embed_tokens.weight")
    with contextlib.ExitStack() as opened:
        files = [safetensors.safe_open(directory / headers[name][0], framework="np") for name in names]
        head, table = (opened.enter_context(file).get_slice(name) for file, name in zip(files, names, strict=True))
        shape = head.get_shape()
        pieces = (slice(at, min(at + _COMPARED, shape[0])) for at in range(0, shape[0], _COMPARED))
        if shape == table.get_shape() and all(np.array_equal(head[piece], table[piece]) for piece in pieces):
            return []
    return [
        f"{HEAD}: found a head that differs from the embedding, expected none or an equal one: the config says tied"
    ]


def _not_finite(array: Float[np.ndarray, "..."]) -> int:
    mask = _INF[array.dtype.itemsize][array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")  # isfinite on bf16 is ten times slower than its bits
    return int(np.count_nonzero((bits & bits.dtype.type(mask)) == mask))


def _raise_all(directory: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise InputError(f"{directory}: {count}{'; '.join(problems[:_LISTED])}{more}")


def _check_saveable(model: Qwen, tokenizer: Tokenizer | None) -> None:
    expected = skeleton(model.config, model.dtype)
    problems = []
    for path in name_table(expected).values():
        array, wanted = _at(model, path), _at(expected, path)
        if array is None or array.shape != wanted.shape or array.dtype.name not in DTYPES:
            shown = None if array is None else f"{array.dtype.name}{array.shape}"
            problems.append(f"model.{path}: found {shown}, expected {wanted.dtype.name}{wanted.shape}")
    if tokenizer is not None and tokenizer.largest_id >= model.config.vocab:
        problems.append(f"tokenizer: found id {tokenizer.largest_id}, expected ids below vocab={model.config.vocab}")
    if problems:
        raise InputError("; ".join(problems[:_LISTED]))


def _contents(
    model: Qwen, tokenizer: Tokenizer | None, directory: Path, max_shard_bytes: int
) -> Iterator[tuple[Path, bytes | dict[str, np.ndarray]]]:
    """Every file of the directory in the order it should appear: config.json last."""
    arrays = {name: _at(model, path) for name, path in name_table(model).items()}
    shards: list[dict[str, jax.Array]] = [{}]
    for name, array in arrays.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + array.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = array
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        # save_file writes wrong bytes from an array that is not contiguous
        yield directory / file, {name: np.ascontiguousarray(array) for name, array in shard.items()}
    if len(shards) > 1:
        total = {"total_size": sum(array.nbytes for array in arrays.values())}
        yield directory / INDEX, _json({"metadata": total, "weight_map": weight_map})
    if tokenizer is not None:
        yield from ((directory / name, content) for name, content in tokenizer.files.items())
    yield directory / CONFIG, _json(model.config.to_hf(model.dtype.name))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _remove_stale_weights(directory: Path, kept: set[str]) -> None:
    """An earlier save's other layout would be read in place of this one."""
    for path in directory.iterdir():
        ours = path.name in (WEIGHTS, INDEX) or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", path.name)
        if ours and path.name not in kept:
            path.unlink()
