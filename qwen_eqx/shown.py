"""What is printed of a value that holds arrays or long texts: a line, whatever they hold."""

import dataclasses
from typing import Any

_LONG = 160  # characters of one field


def short(value: Any) -> str:
    """Of an array its dtype and shape; of anything else the beginning of what it says of itself."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"


def by_field(value: Any) -> str:
    """The name of a dataclass or a named tuple, and each of its fields."""
    names = getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value)]
    return f"{type(value).__name__}({', '.join(f'{name}={short(getattr(value, name))}' for name in names)})"
