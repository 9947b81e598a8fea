"""Flags that are lists, and those that had other names: `--layers 0,1 --sites a,b`, or with spaces for commas."""

import os
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from qwen_lab.bounds import CountOrNone


def _spec(read: Callable[[list[str]], Any], shown: Callable[[Any], list[str]], kind: type) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="LIST",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=shown,
    )


def words(given: list[str]) -> tuple[str, ...]:
    """One for each comma or space."""
    return tuple(word.strip() for each in given for word in each.split(","))


def paths(given: list[str]) -> tuple[str, ...]:
    """As `words`, but for a file or directory that has a comma in its name."""
    return tuple(word for each in given for word in ((each,) if os.path.exists(each) else words([each])))


def axes(given: list[str]) -> tuple[str, ...]:
    """NAME=value,value for each axis: a word without a name is one more value of the axis before it."""
    joined: list[str] = []
    for word in words(given):
        if "=" in word or not joined:
            joined.append(word)
        else:
            joined[-1] += f",{word}"
    return tuple(joined)


Blocks = Annotated[str, _spec(lambda given: ",".join(words(given)), lambda value: [value], str)]
Sites = Annotated[tuple[str, ...], _spec(words, list, tuple)]
Paths = Annotated[tuple[str, ...], _spec(paths, list, tuple)]
Axes = Annotated[tuple[str, ...], _spec(axes, list, tuple)]
MaxPrompt = Annotated[CountOrNone, tyro.conf.arg(aliases=["--max-prompt-tokens", "--max-tokens"])]
"""With the names that commands had for it."""
