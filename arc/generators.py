"""Procedural tasks by family and seed: for tests, benchmarks, and for training small models."""

from collections.abc import Iterator, Sequence
from itertools import count

from arc.errors import InputError
from arc.families_objects import OBJECTS
from arc.families_whole import WHOLE
from arc.family import Family
from arc.task import Task

FAMILIES: dict[str, Family] = {family.name: family for family in (*WHOLE, *OBJECTS)}


def make_task(
    family: str | Family, seed: int, *, sides: tuple[int, int] = (3, 10), train: int = 3, test: int = 1
) -> Task:
    """Task number `seed` of a family: the same for the same arguments, always solvable from its training pairs."""
    if isinstance(family, str):
        if family not in FAMILIES:
            raise InputError(f"family: found {family!r}, expected one of {', '.join(FAMILIES)}")
        family = FAMILIES[family]
    return family.task(seed, sides=sides, train=train, test=test)


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
