"""A run given again with more tasks or steps goes on; one given again with fewer is refused."""

from pathlib import Path
from typing import Any

from qwen_lab.errors import InputError


def raised(out: Path | str, flag: str, there: Any, here: int | None) -> bool:
    """Whether a flag says more than the run in `out` was begun with; None is all there are. Raises where it says less."""
    if type(there) not in (int, type(None)) or there == here:
        return False  # what an earlier run never wrote differs, and is for its reader to refuse
    if here is None or (there is not None and here > there):
        return True
    least = "None (all)" if there is None else there
    raise InputError(f"--{flag}: found {here}, expected at least {least}, as the run in {out} has: name another --out")
