"""A store of objects that fails by a plan: `flaky://` and an absolute path, whose objects are files there.

As with a real one, an object is whole or absent, and other processes see it; `Flaky.fault` is called before and after
each operation, and may raise or kill.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np

UPLOADING = ".uploading-"


class Busy(Exception):
    """As gcsfs says it: no OSError, and a status."""

    __module__ = "gcsfs.retry"

    def __init__(self, code: int):
        super().__init__(f"status {code}")
        self.code = code


class Flaky(fsspec.AbstractFileSystem):
    """Objects in a directory."""

    protocol = "flaky"
    cachable = False
    fault: ClassVar[Callable[[str], None]] = staticmethod(lambda moment: None)
    moments: ClassVar[list[str]] = []

    def _moment(self, said: str) -> None:
        Flaky.moments.append(said)
        Flaky.fault(said)

    def _done(self, name: str, operation: Callable[[], Any]) -> Any:
        self._moment(f"before {name}")
        try:
            return operation()
        finally:
            self._moment(f"after {name}")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._done("info", lambda: self._entry(Path(path)))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        def entries() -> list[dict[str, Any]]:
            return [self._entry(each) for each in sorted(Path(path).iterdir()) if UPLOADING not in each.name]

        found = self._done("ls", entries)
        return found if detail else [each["name"] for each in found]

    def cat_file(self, path: str, start=None, end=None, **kwargs: Any) -> bytes:
        return self._done("cat", lambda: Path(path).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        def upload() -> None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(f"{path}{UPLOADING}{secrets.token_hex(4)}")
            temporary.write_bytes(value)
            try:
                os.link(temporary, path) if mode == "create" else temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

        self._done(f"pipe {mode}", upload)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        def remove() -> None:
            for each in sorted(Path(path).rglob("*"), reverse=True) if recursive else [Path(path)]:
                each.rmdir() if each.is_dir() else each.unlink()
            if recursive:
                Path(path).rmdir()

        self._done("rm", remove)

    @staticmethod
    def _entry(path: Path) -> dict[str, Any]:
        folder = path.is_dir()
        size = 0 if folder else path.stat().st_size
        return {"name": str(path), "size": size, "type": "directory" if folder else "file"}


fsspec.register_implementation("flaky", Flaky, clobber=True)


def seeded(seed: int, share: float) -> Callable[[str], None]:
    """Errors of a network at this share of moments: refusals before, replies lost after."""
    rng = np.random.default_rng(seed)
    errors = [
        lambda: Busy(429),
        lambda: Busy(503),
        lambda: TimeoutError("slow"),
        lambda: ConnectionResetError(104, "reset"),
    ]

    def fault(moment: str) -> None:
        if rng.random() < share:
            raise errors[rng.integers(len(errors))]()

    return fault
