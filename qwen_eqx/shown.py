"""What is printed of a value that holds arrays or long texts: a line, whatever they hold."""

import dataclasses
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

_LONG = 160  # characters of one field
_MOST = 32  # lines of a table
_ROWS, _TOKENS = 8, 48  # of what was generated, in a notebook


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


def values_of(array: Any) -> np.ndarray | None:
    """What an array holds; None of a skeleton, of what is being traced, and of what was given away."""
    if isinstance(array, np.ndarray):
        return array
    try:
        return np.asarray(array) if isinstance(array, jax.Array) and not array.is_deleted() else None
    except TypeError:  # of a tracer
        return None


def generated(
    title: str, facts: Mapping[str, Any], rows: Sequence[tuple[Sequence[int], Sequence[float] | None, float]]
) -> str:
    """What a notebook shows of token ids: each row with its log-probability, a token the darker the surer it was.

    A row is its tokens, their log-probabilities where they are known, and the log-probability of all of it.
    """
    lines = "".join(
        f'<tr><th scope="row">{number}</th><td>{len(tokens):,}</td><td>{total:.3f}</td>'
        f'<td style="text-align:left">{_tokens(tokens, log_probs)}</td></tr>'
        for number, (tokens, log_probs, total) in enumerate(rows[:_ROWS])
    )
    names = "".join(f'<th scope="col">{name}</th>' for name in ("row", "tokens", "log-prob", "ids, darker where surer"))
    more = f"<p>and {len(rows) - _ROWS:,} rows more</p>" if len(rows) > _ROWS else ""
    table = f"<table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>" if rows else ""
    return f"<div>{as_html(title, facts)}{table}{more}</div>"


def _tokens(tokens: Sequence[int], log_probs: Sequence[float] | None) -> str:
    parts = []
    for place, token in enumerate(tokens[:_TOKENS]):
        said, style = "", ""
        if log_probs is not None:
            known = log_probs[place] == log_probs[place]
            probability = math.exp(min(0.0, log_probs[place])) if known else 0.0
            shade = f"rgba(70,140,220,{probability * 0.5:.2f})"
            said, style = f' title="probability {probability:.4g}"', f' style="background:{shade}"'
        parts.append(f"<span{said}{style}>{int(token)}</span>")
    return " ".join(parts) + (f" … ({len(tokens):,} in all)" if len(tokens) > _TOKENS else "")
