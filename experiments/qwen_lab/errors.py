"""What is wrong with what was asked for, in one line; and runs that cannot go on."""

from typing import Any

import arc
import qwen_eqx
import sae


class InputError(ValueError):
    """A flag, a setting or a file that no run can have: the message says what, found and expected; commands exit with 2."""


class RunError(RuntimeError):
    """A run that broke: the message says why and what is kept; commands exit with 1."""


INPUT_ERRORS = (InputError, qwen_eqx.InputError, arc.InputError, sae.InputError)


def at_least_one(config: Any, *names: str) -> None:
    """Raises for a count below 1 among these fields, naming its flag; None is no count."""
    for name in names:
        count = getattr(config, name)
        if count is not None and count < 1:
            raise InputError(f"--{name.replace('_', '-')}: found {count}, expected at least 1")
