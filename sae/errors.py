"""What is wrong with the input or the disk, in one line a person can act on."""

import errno
import shutil
from pathlib import Path


class InputError(ValueError):
    """Bad input: the message names file or argument, field, found and expected; commands exit with 2."""


class DiskFull(OSError):
    """A file that found no room: the message names it, the bytes it needs and those that are free; commands exit with 1."""

    @classmethod
    def at(cls, path: Path, needed: int) -> "DiskFull":
        free = shutil.disk_usage(path.parent).free
        text = (
            f"no room for {path}: {needed:,} bytes needed, {free:,} free on the disk; what was written before is kept"
        )
        return cls(errno.ENOSPC, text)

    def __str__(self) -> str:
        return str(self.strerror)
