"""What is wrong with what was asked for, in one line; and runs that cannot go on."""

import errno
import re
import shutil
from pathlib import Path

import arc
import qwen_eqx
import sae


class InputError(ValueError):
    """A flag, a setting or a file that no run can have: the message says what, found and expected; commands exit with 2."""


class RunError(RuntimeError):
    """A run that broke: the message says why and what is kept; commands exit with 1."""


INPUT_ERRORS = (InputError, qwen_eqx.InputError, arc.InputError, sae.InputError)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full(error: BaseException, path: Path, needed: int | None = None) -> str | None:
    """One line on a disk that could not take what was written, somewhere below `path` if the error names no file."""
    if isinstance(error, OSError):
        number, said = error.errno, error.strerror
        path, needed = Path(error.filename or path), getattr(error, "needed", needed)
    else:  # Rust says so in its text: "No space left on device (os error 28)"
        found = re.search(r"([\w ]+) \(os error (\d+)\)", str(error))
        number, said = (int(found[2]), found[1].strip()) if found else (None, None)
    if number not in FULL:
        return None
    there = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    room = f"found {shutil.disk_usage(there).free:,} bytes free ({said})"
    return f"{path}: {room}, expected room for {'the file' if needed is None else f'{needed:,} bytes'}"


def wrong_name(error: BaseException) -> str | None:
    """One line on a path or name that no system takes: too long, of nobody's home, of characters that are none."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{str(error.filename)[:80]}…: found a path that cannot be ({error.strerror}), expected a shorter one"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return f"~: found no home directory ({error}), expected a path"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:80]!a}: found characters that no file can hold ({error.reason}), expected text"
    return None
