"""A command line becomes a config or one line; lists are `--layers 0,1 --sites a,b`, or with spaces for commas."""

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, TypeVar, cast

import tyro

from arc.grid import MAX_SIDE
from qwen_lab.bounds import CountOrNone
from qwen_lab.errors import InputError

ConfigT = TypeVar("ConfigT")
SAID = (  # of what tyro says of a wrong command line, and what a command says
    (
        r"Error parsing (\S+): .*invalid literal for int\(\) with base 10: (.*)",
        "{0}: found {1}, expected a whole number",
    ),
    (r"Error parsing (\S+): .*could not convert string to float: (.*)", "{0}: found {1}, expected a number"),
    (r"Error parsing (\S+): (.*)", "{0}: found a wrong value ({1}), expected what --help says"),
    (r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.", "{1}: found {0}, expected one of {2}"),
    (r"Missing value for argument '(\S+)'.*", "{0}: found no value, expected one"),
    (r"Unrecognized options: (.*)", "flags: found {0}, expected those that --help names"),
    (r"(.*)", "flags: found {0}, expected what --help says"),
)


def parse(
    config: type[ConfigT],
    description: str | None,
    arguments: Sequence[str] | None = None,
    default: ConfigT | None = None,
) -> ConfigT:
    """The config that a command line says; raises InputError where tyro would draw a box, and exits after --help.

    A config class with `told` reads a part of the words by itself: it gives the defaults of the others, and these.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if default is None and hasattr(config, "told"):
        default, given = cast(Any, config).told(given)
    told: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(config, description=description, args=given, **told)
    except SystemExit as ended:
        if not ended.code:
            raise
    raise InputError(_in_one_line(said.getvalue()))


def _in_one_line(box: str) -> str:
    """The message of a box, which stands below its title and above the next rule, worded as our errors are."""
    parts = [""]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        if line.startswith(("╭", "╰")) or (line.strip("│ ") and not line.strip("│ ─-")):
            parts.append("")
        else:
            parts[-1] = f"{parts[-1]} {line.strip('│ ')}".strip()
    text, *rest = parts[1:] or parts
    nearest = re.search(r"(?:similar to|meant)[^:]*: (--[\w-]+)", " ".join(rest))
    for pattern, line in SAID:
        if found := re.fullmatch(pattern, text):
            groups = [group if len(group) < 200 else f"{group[:80]}…" for group in found.groups()]
            return line.format(*groups) + (f" (such as {nearest[1]})" if nearest else "")
    return text


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


def sides(given: list[str]) -> tuple[int, int]:
    """The smallest and the largest."""
    numbers = [int(word) for word in words(given) if word.isascii() and word.isdigit()]
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] <= MAX_SIDE:
        raise ValueError(f"{' '.join(given)}, expected two numbers from 1 to {MAX_SIDE}, the smaller one first")
    return numbers[0], numbers[1]


Blocks = Annotated[str, _spec(lambda given: ",".join(words(given)), lambda value: [value], str)]
Sites = Annotated[tuple[str, ...], _spec(words, list, tuple)]
Words = Sites
Sides = Annotated[tuple[int, int], _spec(sides, lambda value: [f"{value[0]},{value[1]}"], tuple)]
Paths = Annotated[tuple[str, ...], _spec(paths, list, tuple)]
Axes = Annotated[tuple[str, ...], _spec(axes, list, tuple)]
MaxPrompt = Annotated[CountOrNone, tyro.conf.arg(aliases=["--max-prompt-tokens", "--max-tokens"])]
"""With the names that commands had for it."""
