"""What is wrong with the input, in one line a person can act on."""

import errno
import os
from numbers import Integral
from pathlib import Path

MOST = 2**31 - 1  # sizes and positions are int32 on the device


class InputError(ValueError):
    """Bad input: the message names file or argument, field, found and expected; commands exit with 2."""


class DiskFull(OSError):
    """No room to write: the message names path, bytes needed and bytes free; commands exit with 1."""

    def __init__(self, path: Path, needed: int, free: int):
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.path, self.needed, self.free = path, needed, free

    def __str__(self) -> str:
        room = f"found {self.free:,} bytes free or allowed ({self.strerror}), expected {self.needed:,}"
        return f"{self.path}: {room}; free some, or write elsewhere"


def positive(name: str, value: object) -> None:
    """Raises `InputError` unless `value` is a whole number from 1 to `MOST`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise InputError(f"{name}: found {value!r}, expected a whole number of at least 1")
    if int(value) > MOST:
        raise InputError(f"{name}: found {value!r}, expected a whole number of at most {MOST}")
