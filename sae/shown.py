"""What is printed of a value that holds arrays or long texts: a line, whatever they hold."""

import dataclasses
import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

_LONG = 160  # characters of one field
_MOST = 32  # lines of a table


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


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of them, and how many there are if that is not all."""
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def as_html(title: str, facts: Mapping[str, Any]) -> str:
    """What a notebook shows: a table of names and values, each cut to a line."""
    rows = "".join(
        f'<tr><th scope="row" style="text-align:left">{_escaped(name)}</th>'
        f'<td style="text-align:left">{_escaped(value)}</td></tr>'
        for name, value in itertools.islice(facts.items(), _MOST)
    )
    caption = f'<caption style="text-align:left;font-weight:600">{_escaped(title)}</caption>'
    return f"<table>{caption}<tbody>{rows}</tbody></table>"


def _escaped(value: Any) -> str:
    text = " ".join((value if isinstance(value, str) else short(value)).split())
    return html.escape(text if len(text) <= _LONG else text[: _LONG - 1] + "…")
