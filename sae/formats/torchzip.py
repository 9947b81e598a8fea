"""Tensors out of a torch.save file without running it.

The file is a zip: `data.pkl` says which tensors there are, `data/N` hold their numbers. `data.pkl` is a program for a
stack machine that may call anything; here its opcodes are only listed (`pickletools.genops`) and followed by a machine
that knows containers, numbers and how a tensor is described. Whatever else the program asks for is refused by name.
"""

import math
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.errors import InputError
from sae.files import numpy_dtype

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
MAX_PROGRAM_BYTES = 2**24  # a state dict of a hundred tensors takes some kilobytes


class Name(NamedTuple):
    """A global that the program names; it is never imported."""

    module: str
    name: str


class Storage(NamedTuple):
    """One file of numbers in the zip."""

    dtype: str
    key: str
    elements: int


class Mark:
    """Where a group on the stack begins."""


def read(path: Path) -> dict[str, np.ndarray]:
    """The dict that torch.save wrote, its tensors as NumPy arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            value = _Machine(path, archive).run()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}, expected a torch.save file") from None
    except zipfile.BadZipFile:
        raise InputError(f"{path}: found no zip, expected a torch.save file (torch 1.6 or later)") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {type(value).__name__}, expected a dict of named tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise InputError(f"{path}: {name}: found {type(tensor).__name__}, expected a named tensor")
    return value


class _Machine:
    """Follows the opcodes of data.pkl over plain values, Names, Storages and arrays."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.files = {info.filename: info for info in archive.infolist()}
        programs = [name for name in self.files if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise InputError(f"{path}: found {len(programs)} data.pkl in the zip, expected 1: is it from torch.save?")
        self.root = programs[0].removesuffix("data.pkl")
        if f"{self.root}byteorder" in self.files and self.bytes_of("byteorder", 16) != b"little":
            raise InputError(f"{path}: byteorder: found {self.bytes_of('byteorder', 16)!r}, expected little")

    def bytes_of(self, name: str, limit: int) -> bytes:
        info = self.files.get(self.root + name)
        if info is None:
            raise InputError(f"{self.path}: {name}: found nothing, expected this part of a torch.save file")
        if info.file_size > limit or info.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"{self.path}: {name}: found {info.file_size} bytes, expected at most {limit}, uncompressed"
            )
        return self.archive.read(info)

    def run(self) -> Any:
        program = self.bytes_of("data.pkl", MAX_PROGRAM_BYTES)
        try:
            with warnings.catch_warnings(action="error"):  # a stray escape in a name only warns
                for opcode, argument, _ in pickletools.genops(program):
                    if opcode.name == "STOP":
                        return self.stack.pop()
                    self.follow(opcode.name, argument)
        except (ValueError, LookupError, TypeError, OverflowError, AttributeError, Warning) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.path}: data.pkl: found a broken program ({error!r:.60}), expected tensors"
            ) from None
        raise InputError(f"{self.path}: data.pkl: found no end, expected a whole file")

    def follow(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _VALUES:
            stack.append(_VALUES[opcode](argument))
        elif opcode in {"BINPUT", "LONG_BINPUT", "PUT"}:
            self.memo[int(argument)] = stack[-1]
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif opcode in {"BINGET", "LONG_BINGET", "GET"}:
            stack.append(self.memo[int(argument)])
        elif opcode in _GROUPS:
            items = self.pop_group()
            _GROUPS[opcode](stack, items)
        elif opcode in {"TUPLE1", "TUPLE2", "TUPLE3"}:
            count = int(opcode[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _mapping(stack[-1])[key] = value
        elif opcode == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif opcode == "GLOBAL":
            stack.append(Name(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(Name(str(module), str(name)))
        elif opcode == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif opcode == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif opcode == "BUILD":
            stack.pop()  # attributes of an OrderedDict: versions of torch modules, not weights
        elif opcode not in {"PROTO", "FRAME"}:
            raise InputError(f"{self.path}: data.pkl: found the instruction {opcode}, expected plain tensors")

    def pop_group(self) -> list[Any]:
        start = max(index for index, value in enumerate(self.stack) if isinstance(value, Mark))
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def storage(self, identity: Any) -> Storage:
        kind, name, key, _, elements = identity
        if kind != "storage" or not isinstance(name, Name) or name.module != "torch" or name.name not in STORAGES:
            raise InputError(
                f"{self.path}: data.pkl: found storage {name!r:.60}, expected one of {', '.join(STORAGES)}"
            )
        return Storage(STORAGES[name.name], str(key), int(elements))

    def call(self, function: Any, arguments: Any) -> Any:
        if function == Name("collections", "OrderedDict") and arguments == ():
            return {}
        if function == Name("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor(*arguments[:4])
        if function == Name("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        spelled = ".".join(function) if isinstance(function, Name) else repr(function)
        raise InputError(f"{self.path}: data.pkl: found a call of {spelled:.60}, expected tensors only: it is not run")

    def tensor(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        """A view of a storage, copied out; the strides may not reach beyond it."""
        dtype = numpy_dtype(storage.dtype)
        data = self.bytes_of(f"data/{storage.key}", storage.elements * dtype.itemsize)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        repeats = math.prod(shape) > max(storage.elements, 1)  # a short file may not ask for terabytes
        short = len(data) != storage.elements * dtype.itemsize
        if min((offset, *shape, *strides)) < 0 or short or repeats or (0 not in shape and last >= storage.elements):
            raise InputError(f"{self.path}: data/{storage.key}: found {len(data)} bytes, expected a tensor of {shape}")
        if 0 in shape:
            return np.empty(shape, dtype)
        flat = np.frombuffer(data, dtype)[offset:]
        steps = tuple(stride * dtype.itemsize for stride in strides)
        return np.array(np.lib.stride_tricks.as_strided(flat, shape, steps))


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError("an item of what is no dict")
    return value


def _set_items(stack: list[Any], items: list[Any]) -> None:
    _mapping(stack[-1]).update(zip(items[::2], items[1::2], strict=True))


_VALUES: dict[str, Callable[[Any], Any]] = {
    "MARK": lambda _: Mark(),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
} | dict.fromkeys(
    ["BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"],
    lambda argument: argument,
)
_GROUPS: dict[str, Callable[[list[Any], list[Any]], None]] = {
    "TUPLE": lambda stack, items: stack.append(tuple(items)),
    "SETITEMS": _set_items,
    "APPENDS": lambda stack, items: stack[-1].extend(items),
    "POP_MARK": lambda stack, items: None,
}
