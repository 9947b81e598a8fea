"""torch.save files are followed, never run: what they say is read, and whatever else they ask for is refused."""

import contextlib
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae
from sae import files
from sae.formats import torchzip

FIXTURES = Path(__file__).parent / "fixtures" / "sae"
REAL = FIXTURES / "dictionary_learning" / "MatryoshkaBatchTopKSAE" / "ae.pt"
KINDS = {dtype: name for name, dtype in torchzip.STORAGES.items()}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(values) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def tensor(key: str, dtype: str, elements: int, offset: int, shape, strides) -> bytes:
    """The program torch writes for one tensor, opcode by opcode."""
    storage = b"(" + text("storage") + f"ctorch\n{KINDS[dtype]}\n".encode() + text(key) + text("cpu") + number(elements)
    empty = b"ccollections\nOrderedDict\n)R"
    parts = storage + b"tQ" + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + empty
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + parts + b"tR"


def program(*entries: tuple[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + body for name, body in entries) + b"u."


def write(path: Path, data: bytes, storages: dict[str, bytes], compression=zipfile.ZIP_STORED, **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in ({f"data/{key}": value for key, value in storages.items()} | extra).items():
            archive.writestr(f"archive/{name}", content)
    return path


@st.composite
def views(draw):
    """A contiguous array and a permuted view of it, as torch saves a transposed tensor."""
    dtype = draw(st.sampled_from(sorted(KINDS)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = int(np.prod(shape)) if shape else 1
    base = (np.arange(size) % 2 if dtype == "bool" else np.arange(size) % 100).astype(files.numpy_dtype(dtype))
    base = base.reshape(shape)
    return base, base.transpose(draw(st.permutations(range(base.ndim))))[
        draw(st.sampled_from([0, 1])) if False else ...
    ]


@given(views())
def test_a_tensor_of_any_dtype_and_stride_is_read_as_it_was(tmp_path_factory, pair):
    base, view = pair
    strides = [stride // base.itemsize for stride in view.strides]
    body = tensor("0", base.dtype.name, base.size, 0, view.shape, strides)
    path = write(tmp_path_factory.mktemp("torch") / "x.pt", program(("w", body)), {"0": base.tobytes()})
    (found,) = torchzip.read(path).values()
    assert found.dtype == base.dtype
    np.testing.assert_array_equal(found, view)


def test_an_offset_into_a_shared_storage(tmp_path):
    data = np.arange(10, dtype=np.float32)
    body = tensor("0", "float32", 10, 4, (2, 3), (3, 1))
    path = write(tmp_path / "x.pt", program(("w", body)), {"0": data.tobytes()}, byteorder=b"little", version=b"3\n")
    np.testing.assert_array_equal(torchzip.read(path)["w"], data[4:].reshape(2, 3))


def call(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + text(argument) + b"tR"


GOOD = tensor("0", "float32", 6, 0, (2, 3), (3, 1))
SIX = {"0": np.zeros(6, np.float32).tobytes()}


def stored(*layout) -> bytes:
    return program(("w", tensor("0", "float32", *layout)))


EVIL = {"kind": (b"FloatStorage", b"EvilStorage"), "module": (b"ctorch\nFloat", b"cposix\nFloat")}
HOSTILE = {
    "a shell command": (program(("w", call("os", "system", "touch victim"))), SIX, "a call of os.system"),
    "eval": (program(("w", call("builtins", "eval", "open('victim', 'w')"))), SIX, "a call of builtins.eval"),
    "a torch loader": (program(("w", call("torch", "load", "victim"))), SIX, "a call of torch.load"),
    "an object made": (program(("w", b"ccollections\nCounter\n)\x81")), SIX, "instruction NEWOBJ"),
    "an instance": (program(("w", b"(ios\nsystem\n")), SIX, "instruction INST"),
    "an extension": (program(("w", b"\x82\x01")), SIX, "instruction EXT1"),
    "a storage of no kind": (program(("w", GOOD.replace(*EVIL["kind"]))), SIX, "found storage"),
    "a storage from elsewhere": (program(("w", GOOD.replace(*EVIL["module"]))), SIX, "found storage"),
    "a name alone": (program(("w", b"cos\nsystem\n")), SIX, "w: found Name"),
    "a number": (program(("w", number(1))), SIX, "w: found int"),
    "a list": (b"\x80\x02]q\x00.", SIX, "found list, expected a dict"),
    "reading beyond the storage": (stored(6, 1, (2, 3), (3, 1)), SIX, "expected a tensor"),
    "strides beyond the storage": (stored(6, 0, (2, 3), (4, 1)), SIX, "expected a tensor"),
    "a negative stride": (stored(6, 5, (6,), (-1,)), SIX, "expected a tensor"),
    "a huge repetition": (stored(6, 0, (2**30, 2**30), (0, 0)), SIX, "expected a tensor"),
    "more elements than bytes": (stored(7, 0, (7,), (1,)), SIX, "expected a tensor"),
    "fewer elements than bytes": (stored(5, 0, (5,), (1,)), SIX, "at most 20"),
    "a storage that is not there": (program(("w", GOOD.replace(text("0"), text("9")))), SIX, "data/9: found nothing"),
    "a path out of the zip": (program(("w", GOOD.replace(text("0"), text("../../x")))), SIX, "found nothing"),
    "a program cut short": (program(("w", GOOD))[:-5], SIX, "data.pkl"),
    "an empty stack": (b"\x80\x02.", SIX, "broken program"),
    "an item of nothing": (b"\x80\x02)" + text("a") + text("b") + b"s.", SIX, "broken program"),
    "an unknown memo": (b"\x80\x02h\x09.", SIX, "broken program"),
    "no program": (b"", SIX, "data.pkl"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_plain_tensor_is_refused_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, storages, expected = HOSTILE[name]
    path = write(tmp_path / "x.pt", data, storages)
    with pytest.raises(sae.InputError) as error:
        torchzip.read(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "victim").exists()


def test_zips_that_are_no_torch_files_are_refused(tmp_path):
    good = program(("w", GOOD))
    with pytest.raises(sae.InputError, match="byteorder: found b'big'"):
        torchzip.read(write(tmp_path / "big.pt", good, SIX, byteorder=b"big"))
    with pytest.raises(sae.InputError, match="uncompressed"):
        torchzip.read(write(tmp_path / "bomb.pt", good, SIX, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(write(tmp_path / "two.pt", good, SIX), "a") as archive:
        archive.writestr("other/data.pkl", good)
    with pytest.raises(sae.InputError, match=r"found 2 data\.pkl"):
        torchzip.read(tmp_path / "two.pt")
    with pytest.raises(sae.InputError, match="cannot be read"):
        torchzip.read(tmp_path / "absent.pt")
    (tmp_path / "legacy.pt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # torch before 1.6: no zip
    with pytest.raises(sae.InputError, match="found no zip"):
        torchzip.read(tmp_path / "legacy.pt")


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_program_is_read_or_refused_never_more(tmp_path_factory, damage):
    with zipfile.ZipFile(REAL) as archive:
        parts = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    data = bytearray(parts.pop("data.pkl"))
    for place, value in damage:
        data[place % len(data)] = value
    path = write(tmp_path_factory.mktemp("damaged") / "ae.pt", bytes(data), {}, **parts)
    with contextlib.suppress(sae.InputError):
        assert all(isinstance(value, np.ndarray) for value in torchzip.read(path).values())
