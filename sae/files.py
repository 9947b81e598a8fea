"""Files that are whole or absent: atomic commits, strict JSON, safetensors mapped after their header was checked."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import safetensors

from sae.errors import DiskFull, InputError

Value = TypeVar("Value")
SAFETENSORS_DTYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I32": "int32", "I64": "int64",
    "I8": "int8", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ALIGNED = ("I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I8", "U8", "BOOL")  # the order in a file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, a quota, a limit on the size of files
DIRECTORY_BYTES = 4096  # a block of most file systems
MAX_JSON_BYTES = 2**30  # a sidecar holds texts, never gigabytes of them


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A file's bytes, made as they are written, for those that never lie in memory together; may be made again."""

    size: int
    made: Callable[[], Iterator[bytes | memoryview]]

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return self.made()


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def hashed(pieces: Pieces) -> tuple[Pieces, Callable[[], str]]:
    """The same pieces, and their digest once they are written: they are made only then."""
    last: list[Any] = []

    def made() -> Iterator[bytes | memoryview]:
        last[:] = [hashlib.sha256()]
        for piece in pieces:
            last[0].update(piece)
            yield piece

    return Pieces(len(pieces), made), lambda: "sha256:" + last[0].hexdigest()


def digest_file(path: Path) -> str:
    """As `digest`, of a file that need not fit in memory."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def is_temporary(name: str) -> bool:
    """Whether `commit` made the file of this name and was killed before its rename."""
    return name.startswith(".") and name.endswith(".tmp")


def fsync_directory(directory: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """The directory and those that it lies in, where they are not there yet."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(error.errno, directory, DIRECTORY_BYTES) from error
        raise


def commit(path: Path, data: bytes | Pieces) -> None:
    """Write a file so that it is whole or absent after a kill: temporary name, fsync, rename, fsync the directory."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)  # left by a killed run
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two runs at once never share a file
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in FULL:
            raise DiskFull(error.errno, path, len(data)) from error
        raise
    fsync_directory(path.parent)


def dump_json(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, ASCII (a lone surrogate in a completion survives), no NaN."""
    try:
        return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata: found a value JSON cannot hold, expected plain finite values: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else raises InputError."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{path}: found {size} bytes, expected at most {MAX_JSON_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}, expected a JSON file") from None
    return parse_json(str(path), data)


def parse_json(where: str, data: bytes) -> dict[str, Any]:
    """The object in these bytes; anything else raises InputError, which names `where` they are from."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: found no valid JSON ({error}), expected an object") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: found {type(value).__name__}, expected an object")
    return value


def check_fields(path: Path | str, found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> None:
    """Raise InputError unless `found` has exactly the expected fields with values of the expected types."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise InputError(f"{path}: {prefix}{name}: found an unknown field, expected {', '.join(expected)}")
        if name not in found:
            raise InputError(f"{path}: {prefix}{name}: found nothing, expected {_spell_type(expected[name])}")
        value = found[name]
        if not isinstance(value, expected[name]) or isinstance(value, bool):
            raise InputError(f"{path}: {prefix}{name}: found {value!r:.80}, expected {_spell_type(expected[name])}")


def typed(path: Path, found: Mapping[str, Any], name: str, kind: type[Value], default: Value | None = None) -> Value:
    """A field of what is another team's to write, or `default` where there is none; of another type it is refused."""
    value = default if name not in found and default is not None else found.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{path}: {name}: found {value!r:.80}, expected {_spell_type(kind)}")
    return value


def _spell_type(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one level of dotted names, to compare them field by field."""
    flat: dict[str, Any] = {}
    for name, field in value.items():
        flat |= flatten(field, f"{prefix}{name}.") if isinstance(field, dict) and field else {prefix + name: field}
    return flat


def tensor_file(tensors: Mapping[str, tuple[str, tuple[int, ...], Callable[[], Iterator[np.ndarray]]]]) -> Pieces:
    """The safetensors file of tensors by name, each a dtype, a shape, and what makes its values in order, in parts.

    Byte for byte what `safetensors.numpy.save` makes of whole arrays.
    """
    spelled = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    for name, (dtype, _, _) in tensors.items():
        if dtype not in spelled:
            raise InputError(f"{name}: dtype: found {dtype}, expected {', '.join(spelled)}")
    order = sorted(tensors, key=lambda name: (ALIGNED.index(spelled[tensors[name][0]]), name))
    header, end = {}, 0
    for name in order:
        dtype, shape, _ = tensors[name]
        begin, end = end, end + math.prod(shape) * numpy_dtype(dtype).itemsize
        header[name] = {"dtype": spelled[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    words = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    words += b" " * (-len(words) % 8)

    def made() -> Iterator[bytes | memoryview]:
        yield len(words).to_bytes(8, "little") + words
        for name in order:
            for part in tensors[name][2]():
                yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data  # no buffer knows bf16

    return Pieces(8 + len(words) + end, made)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor in a safetensors file, after the library has checked the whole header."""
    return {name: (dtype, shape) for name, (dtype, shape, _) in _layout(path).items()}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped read-only: nothing is read before it is indexed."""
    layout = _layout(path)
    mapped = np.memmap(path, mode="r", dtype=np.uint8)
    return {
        name: np.asarray(mapped[begin:end]).view(numpy_dtype(dtype)).reshape(shape)
        for name, (dtype, shape, (begin, end)) in layout.items()
    }


def _layout(path: Path) -> dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]:
    """Dtype, shape and place in the file of each tensor."""
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # refuses headers that overlap, leave holes or reach beyond the file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}, expected a safetensors file") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: found no valid safetensors file ({error}), expected whole tensors") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    layout = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(f"{path}: {name}: dtype: found {entry['dtype']}, expected {', '.join(SAFETENSORS_DTYPES)}")
        begin, end = entry["data_offsets"]
        place = (8 + length + begin, 8 + length + end)
        layout[name] = (SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), place)
    return layout
