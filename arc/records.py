"""Large files one record at a time: JSONL and parquet, on disk or on the Hugging Face hub, never held whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from arc.errors import InputError
from arc.files import parse_json

HUB = "hf://"
STREAMED = (".jsonl", ".parquet")


def iter_records(source: str | Path, start: int = 0) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    """(place, record) from record `start` on; one that cannot be read comes as its error, so a caller may skip it."""
    source = str(source)
    if source.endswith(".parquet"):
        yield from _parquet(source, start)
        return
    with _open(source) as handle:
        taken = 0  # blank lines are no records
        for number, line in enumerate(handle):
            taken += bool(line.strip())
            if taken <= start or not line.strip():
                continue
            where = f"{source}: line {number + 1}"
            try:
                record = parse_json(line.decode("utf-8-sig"), where)
            except UnicodeDecodeError:
                yield where, InputError(f"{where}: found bytes that are no UTF-8 text, expected UTF-8 text")
            except InputError as error:
                yield where, error
            else:
                yield where, record if isinstance(record, dict) else _not_an_object(where, record)


def _not_an_object(where: str, record: object) -> InputError:
    return InputError(f"{where}: found a JSON {type(record).__name__}, expected an object")


def _parquet(source: str, start: int) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet as parquet  # an extra: most sources are JSON
    except ImportError:
        raise InputError(f"{source}: parquet needs pyarrow: install the extra `data`, or take the JSONL file") from None
    with _open(source) as handle:
        number = 0
        for batch in parquet.ParquetFile(handle).iter_batches(batch_size=64):
            if number + batch.num_rows > start:
                for offset, record in enumerate(batch.to_pylist()):
                    if number + offset >= start:
                        yield f"{source}: row {number + offset + 1}", record
            number += batch.num_rows


@contextmanager
def _open(source: str) -> Iterator[Any]:
    with _hub_file(source) if source.startswith(HUB) else _local_file(source) as handle:
        yield handle


def _local_file(source: str) -> IO[bytes]:
    try:
        return open(source, "rb")
    except FileNotFoundError:
        raise InputError(f"{source}: no such file or directory") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from None


def _hub_file(source: str) -> Any:
    from huggingface_hub import HfFileSystem  # slow to import, and only the hub needs it

    try:
        # reads ranges over HTTP: the first thousand rows of a 3 GB file cost a few megabytes
        return HfFileSystem().open(source.removeprefix(HUB), "rb", block_size=1 << 24)
    except Exception as error:  # the hub's errors share no base class: offline, missing, gated, bad name
        raise InputError(f"{source}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def hub_files(dataset: str, revision: str = "main") -> list[str]:
    """The JSONL or parquet files of a hub data set as `hf://` addresses, in order of name."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(dataset, repo_type="dataset", revision=revision)
    except Exception as error:
        raise InputError(f"hub data set {dataset}: {_first_line(error)}") from None
    files = sorted(name for name in names if name.endswith(STREAMED))
    if not files:
        raise InputError(f"hub data set {dataset}: found no {' or '.join(STREAMED)} file among {len(names)}")
    return [f"{HUB}datasets/{dataset}@{revision}/{name}" for name in files]


def dumps(value: object) -> str:
    """JSON on one line without spaces: what ARC's own files look like."""
    return json.dumps(value, separators=(",", ":"))
