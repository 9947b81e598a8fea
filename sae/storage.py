"""Where bytes lie: a local directory, or any URL that fsspec knows (`pip install 'qwen-eqx[remote]'`), told by its name.

    home = storage.place("runs/extract" or "s3://bucket/prefix")
    (home / "shards/000000.safetensors").put(data)     # whole or absent, whatever dies
    (home / "shards/000000.json").create(mark)         # once: the same bytes again are a write whose reply was lost

A network's refusals for a while (429, 5xx, timeouts, broken connections) are waited out; what is wrong for good is said.
"""

import abc
import dataclasses
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sae import files
from sae.errors import InputError, StorageFailed

Result = TypeVar("Result")
ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE = 8, 0.25, 15.0  # seconds: about half a minute in all
AT_ONCE = 2**26  # bytes: what is longer and comes in pieces is sent in pieces
TOGETHER = 16  # objects fetched at once
_FOR_GOOD = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class Place(abc.ABC):
    """A file or folder; what is put there is whole or absent."""

    @abc.abstractmethod
    def __truediv__(self, name: str) -> "Place": ...

    @property
    @abc.abstractmethod
    def location(self) -> Path | str:
        """The path or URL that `place` would make this from."""

    @abc.abstractmethod
    def size(self) -> int | None:
        """Bytes of the file; None where there is none."""

    @abc.abstractmethod
    def sizes(self) -> dict[str, int | None]:
        """What a folder holds, by name: bytes of files, None for folders. Empty where there is no folder."""

    @abc.abstractmethod
    def read(self) -> bytes:
        """The whole file; FileNotFoundError where there is none."""

    @abc.abstractmethod
    def put(self, data: bytes | files.Pieces) -> None:
        """Write the file, over another if there is one. Pieces are never in memory together, unless they are small."""

    @abc.abstractmethod
    def create(self, data: bytes) -> None:
        """Write a file that is not there yet; one with other bytes is never written over."""

    @abc.abstractmethod
    def remove(self) -> None:
        """Take the file or the whole folder away, if it is there."""

    @abc.abstractmethod
    def on_disk(self) -> AbstractContextManager[Path]:
        """The file as one of this machine's, for so long; what was mapped from it stays. FileNotFoundError without one."""

    def __str__(self) -> str:
        return str(self.location)

    def json(self) -> dict[str, Any]:
        """The object in a JSON file; anything else raises InputError."""
        try:
            return files.parse_json(str(self), self.read())
        except FileNotFoundError as error:
            raise InputError(f"{self}: cannot be read: no such file, expected a JSON file") from error


@dataclasses.dataclass(frozen=True)
class Local(Place):
    """A path."""

    path: Path

    def __truediv__(self, name: str) -> "Local":
        return Local(self.path / name)

    @property
    def location(self) -> Path:
        return self.path

    def size(self) -> int | None:
        return self.path.stat().st_size if self.path.is_file() else None

    def sizes(self) -> dict[str, int | None]:
        if not self.path.is_dir():
            return {}
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size if entry.is_file() else None for entry in entries}

    def read(self) -> bytes:
        return self.path.read_bytes()

    def put(self, data: bytes | files.Pieces) -> None:
        if new := not self.path.parent.is_dir():
            files.make_directory(self.path.parent)
        files.commit(self.path, data)
        if new:
            files.fsync_directory(self.path.parent.parent)

    def create(self, data: bytes) -> None:
        if self.path.exists():
            _expect_same(self, self.read(), data)
        else:
            self.put(data)

    def remove(self) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir():
            files.fsync_directory(self.path.parent)

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        yield self.path

    def json(self) -> dict[str, Any]:
        return files.read_json(self.path)


@dataclasses.dataclass(frozen=True)
class Remote(Place):
    """An object, or the prefix of some, in a store that fsspec opens."""

    url: str
    filesystem: Any  # fsspec's AbstractFileSystem
    path: str  # the URL without its protocol

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}", self.filesystem, f"{self.path}/{name}")

    @property
    def location(self) -> str:
        return self.url

    def size(self) -> int | None:
        try:
            found = self._persist("looked up", lambda: self.filesystem.info(self.path))
        except FileNotFoundError:
            return None
        return found["size"] if found["type"] == "file" else None

    def sizes(self) -> dict[str, int | None]:
        def listing() -> list[dict[str, Any]]:
            self.filesystem.invalidate_cache()  # others write there too
            return self.filesystem.ls(self.path, detail=True)

        try:
            found = self._persist("listed", listing)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        names = {each["name"].rstrip("/").rpartition("/")[2]: each for each in found}
        return {name: each["size"] if each["type"] == "file" else None for name, each in names.items()}

    def read(self) -> bytes:
        return self._persist("read", lambda: self.filesystem.cat_file(self.path))

    def put(self, data: bytes | files.Pieces) -> None:
        if isinstance(data, bytes) or len(data) <= AT_ONCE:
            data = b"".join(data) if isinstance(data, files.Pieces) else data
            self._persist("written", lambda: self.filesystem.pipe_file(self.path, data))
        else:
            self._persist("written", lambda: self._upload(data))

    def _upload(self, pieces: files.Pieces) -> None:
        with self.filesystem.open(self.path, "wb") as file:
            for piece in pieces:
                file.write(piece)

    def create(self, data: bytes) -> None:
        try:
            self._persist("written", lambda: self.filesystem.pipe_file(self.path, data, mode="create"))
        except FileExistsError:
            _expect_same(self, self.read(), data)  # it is, where the reply to an earlier attempt was lost

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            self._persist("removed", lambda: self.filesystem.rm(self.path, recursive=self.size() is None))

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="sae-") as folder:
            copy = Path(folder) / self.url.rpartition("/")[2]
            copy.write_bytes(self.read())
            try:
                yield copy
            except InputError as error:
                raise InputError(str(error).replace(str(copy), self.url)) from None

    def _persist(self, done: str, operation: Callable[[], Result]) -> Result:
        """The operation's result, tried again while what stops it may pass."""
        for attempt in range(ATTEMPTS):
            try:
                return operation()
            except Exception as error:
                if not _may_pass(error):
                    raise
                if attempt == ATTEMPTS - 1:
                    raise StorageFailed(self.url, done, ATTEMPTS, error) from error
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
            time.sleep(
                pause * random.uniform(0.5, 1.0)
            )  # machines that were refused together do not come back together
        raise AssertionError


def place(location: str | Path) -> Place:
    """What a path or a URL names."""
    if not is_url(location):
        return Local(Path(location))
    try:
        import fsspec
    except ImportError:
        raise InputError(
            f"{location}: found no fsspec, expected it for a URL: pip install 'qwen-eqx[remote]'"
        ) from None
    url = str(location).rstrip("/")
    try:
        filesystem, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise InputError(f"{url}: {error}, expected it installed: pip install 'qwen-eqx[remote]'") from None
    except ValueError as error:
        raise InputError(f"{url}: {error}, expected s3://, gs://, memory:// or another that fsspec knows") from None
    return Remote(url, filesystem, path)


def is_url(location: str | Path) -> bool:
    """Whether it is PROTOCOL://…; a web page is no storage, and a `Path` keeps one of two slashes."""
    return isinstance(location, str) and re.match("(?!https?:)[a-z][a-z0-9+.-]+://", location) is not None


def read_all(places: Sequence[Place]) -> list[dict[str, Any]]:
    """The JSON objects in several files, fetched together where each fetch waits for a network."""
    if not any(isinstance(each, Remote) for each in places):
        return [each.json() for each in places]
    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(lambda each: each.json(), places))


def _expect_same(where: Place, found: bytes, data: bytes) -> None:
    if found != data:
        raise InputError(f"{where}: found other bytes, expected none or the same: it is written once")


def _may_pass(error: Exception) -> bool:
    """Whether it may be gone in a moment: told by an HTTP status where there is one, else by being the network's."""
    if isinstance(error, _FOR_GOOD) or "Credentials" in type(error).__name__:
        return False
    if (status := _status(error) or _status(error.__cause__)) is not None:
        return status in (408, 425, 429) or status >= 500
    network = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "requests", "urllib3")
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in network


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of aiohttp, gcsfs or botocore."""
    response = getattr(error, "response", None)
    meta = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    found = meta.get("HTTPStatusCode", getattr(error, "status", getattr(error, "code", None)))
    return int(found) if isinstance(found, int | str) and str(found).isdecimal() else None
