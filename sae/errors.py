"""What is wrong with the input or the disk, in one line a person can act on."""

import os
import shutil
from pathlib import Path


class InputError(ValueError):
    """Bad input: the message names file or argument, field, found and expected; commands exit with 2."""


class DiskFull(OSError):
    """A file that found no room: the message names it, the bytes it needs and those that are free; commands exit with 1."""

    def __init__(self, number: int, path: Path, needed: int):
        super().__init__(number, os.strerror(number), str(path))
        there = next(folder for folder in path.absolute().parents if folder.is_dir())
        self.needed, self.free = needed, shutil.disk_usage(there).free

    def __str__(self) -> str:
        return f"{self.filename}: found {self.free:,} bytes free ({self.strerror}), expected room for {self.needed:,}"


class StorageFailed(OSError):
    """A remote store that went on failing: the message names the object and the last reason; commands exit with 1."""

    def __init__(self, url: str, done: str, attempts: int, error: Exception):
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        super().__init__(
            f"{url}: found {attempts} failures ({reason:.200}), expected it {done}: give the command again"
        )
