"""Procedural tasks by family and seed: for tests, benchmarks, and for training small models."""

import re
from collections.abc import Iterator, Sequence
from itertools import count

from arc.errors import InputError
from arc.families_cells import CELLS
from arc.families_objects import OBJECTS
from arc.families_whole import WHOLE
from arc.family import AND_THEN, Family, composed
from arc.task import Task

HELD_OUT_SEEDS = 1_000_000  # tasks of lower seeds are for measuring: whoever trains takes higher ones
PROCEDURAL = "procedural"  # the name of these as a source of tasks
SIDES = (3, 6)
EACH = 40
FAMILIES: dict[str, Family] = {family.name: family for family in (*WHOLE, *OBJECTS, *CELLS)}
COMPOSITIONS = (
    "gravity+mirror",
    "extend_line+frame",
    "denoise+keep_half",
    "fill_enclosed+mirror",
    "crop_to_object+frame",
    "outline+recolour",
    "sort+frame",
    "draw_lines+keep_half",
    "mark_largest+mirror",
    "recolour+scale",
)  # two rules in turn, for measuring; any two families compose


def make_task(
    family: str | Family, seed: int, *, sides: tuple[int, int] = (3, 10), train: int = 3, test: int = 1
) -> Task:
    """Task number `seed` of a family: the same for the same arguments, always solvable from its training pairs."""
    if isinstance(family, str):
        family = named(family)
    return family.task(seed, sides=sides, train=train, test=test)


def named(family: str) -> Family:
    """The family of that name; `gravity+mirror` is one rule after another."""
    parts = family.split(AND_THEN)
    if len(parts) > 2 or any(part not in FAMILIES for part in parts):
        known = ", ".join(FAMILIES)
        raise InputError(f"family: found {family!r:.80}, expected one of {known}, or two of them joined by {AND_THEN}")
    return FAMILIES[family] if len(parts) == 1 else composed(FAMILIES[parts[0]], FAMILIES[parts[1]])


def stream(
    seed: int = 0,
    families: Sequence[str | Family] = tuple(FAMILIES),
    *,
    sides: tuple[int, int] = (3, 10),
    train: int = 3,
    test: int = 1,
) -> Iterator[Task]:
    """Endless tasks, the families in turn; seeds count up from `seed` so that two streams may be told apart."""
    for number in count(seed):
        for family in families:
            yield make_task(family, number, sides=sides, train=train, test=test)


def held_out(
    sides: tuple[int, int] = SIDES, families: Sequence[str] = tuple(FAMILIES), each: int = EACH
) -> Iterator[Task]:
    """The first `each` tasks of every family for measuring, the families in turn; fewer where none fits the sides."""
    for seed in range(each):
        for family in families:
            try:
                yield make_task(family, seed, sides=sides)
            except InputError as error:
                if "found no task" not in str(error):
                    raise


def sides_of(source: str) -> tuple[int, int] | None:
    """The sides that `procedural` or `procedural/3-6` names; None of any other source."""
    if source == PROCEDURAL:
        return SIDES
    match = re.fullmatch(PROCEDURAL + r"/(\d{1,2})-(\d{1,2})", source, re.ASCII)
    return None if match is None else (int(match[1]), int(match[2]))
