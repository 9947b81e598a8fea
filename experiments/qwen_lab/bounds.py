"""What a number of a flag may be, said where the flag is declared: `steps: Count = 600`."""

import dataclasses
import math
import types
import typing
from typing import Annotated, Any

import tyro

from qwen_lab.errors import InputError


@dataclasses.dataclass(frozen=True)
class Within:
    """From `least` to `most`, both allowed; `or_zero` allows 0 beside."""

    least: int | float
    most: int | float
    or_zero: bool = False

    def check(self, name: str, value: int | float) -> None:
        """Raises for a value outside, which NaN is too."""
        if self.least <= value <= self.most or (self.or_zero and value == 0):
            return
        low, high = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in (self.least, self.most))
        zero = "0 or " if self.or_zero else ""
        rule = f"at most {high}" if value > self.most else f"at least {low}"
        rule = rule if math.isfinite(value) else f"a number from {low} to {high}"
        raise InputError(f"--{name.replace('_', '-')}: found {value}, expected {zero}{rule}")


MOST = 10**9
Count = Annotated[int, Within(1, MOST), tyro.conf.arg(metavar="1 to 10^9")]
CountOrNone = Annotated[int | None, Within(1, MOST), tyro.conf.arg(metavar="1 to 10^9, or None")]
Whole = Annotated[int, Within(0, MOST), tyro.conf.arg(metavar="0 to 10^9")]
WholeOrNone = Annotated[int | None, Within(0, MOST), tyro.conf.arg(metavar="0 to 10^9, or None")]
Seed = Annotated[int, Within(0, 2**63 - 1), tyro.conf.arg(metavar="0 to 2^63 - 1")]
Weight = Annotated[float, Within(0.0, 1e6), tyro.conf.arg(metavar="0 to 1e6")]
Strength = Annotated[float, Within(-1e6, 1e6), tyro.conf.arg(metavar="-1e6 to 1e6")]
Share = Annotated[float, Within(0.0, 1.0), tyro.conf.arg(metavar="0 to 1")]
Times = Annotated[float, Within(1.0, 1e6, or_zero=True), tyro.conf.arg(metavar="0, or 1 to 1e6")]


def check(config: Any) -> None:
    """Raises for the first field whose number is out of its bounds; None is no number."""
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if value is not None:
            for bounds in _bounds(kind):
                bounds.check(name, value)


def _bounds(kind: Any) -> list[Within]:
    """Of a type, or of the members of `X | None`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [bounds for each in typing.get_args(kind) for bounds in _bounds(each)]
    if typing.get_origin(kind) is not Annotated:
        return []
    return _bounds(kind.__origin__) + [each for each in kind.__metadata__ if isinstance(each, Within)]
