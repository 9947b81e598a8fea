"""What is wrong with the input, in one line a person can act on."""

from numbers import Integral


class InputError(ValueError):
    """Bad input: the message names file or argument, field, found and expected; commands exit with 2."""


def positive(name: str, value: object) -> None:
    """Raises `InputError` unless `value` is a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise InputError(f"{name}: found {value!r}, expected a whole number of at least 1")
