"""Symmetries of the puzzle: what may be done to every grid of a task without changing what is asked.

An augmentation is a value: it prints as `rotate90 colours=0312456789 order=2,0,1`, reads back, applies to tasks,
inverts on predictions, and composes. Training and test grids are mapped alike; training pairs also change their order.
"""

import math
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from jaxtyping import Shaped

from arc.errors import InputError
from arc.grid import COLOURS, Grid, as_grid
from arc.task import Pair, Task

# The dihedral group of the square as (quarter turns counterclockwise, then transposed?).
SYMMETRIES = {
    "identity": (0, False),
    "rotate90": (1, False),
    "rotate180": (2, False),
    "rotate270": (3, False),
    "transpose": (0, True),
    "flip_horizontal": (1, True),  # left becomes right
    "antitranspose": (2, True),
    "flip_vertical": (3, True),  # upside down
}
_NAMES = {value: name for name, value in SYMMETRIES.items()}
KEPT = tuple(range(COLOURS))


@dataclass(frozen=True)
class Augmentation:
    """First the symmetry, then colour c becomes `colours[c]`; training pair i is the task's pair `order[i]`."""

    symmetry: str = "identity"
    colours: tuple[int, ...] = KEPT
    order: tuple[int, ...] = ()
    """Empty keeps the order of any number of pairs."""

    def __post_init__(self):
        if self.symmetry not in SYMMETRIES:
            raise InputError(f"symmetry: found {self.symmetry!r}, expected one of {', '.join(SYMMETRIES)}")
        if sorted(self.colours) != list(KEPT):
            raise InputError(f"colours: found {self.colours}, expected a permutation of 0 to 9")
        if sorted(self.order) != list(range(len(self.order))):
            raise InputError(f"order: found {self.order}, expected a permutation of 0 to {len(self.order) - 1}")
        if self.order == tuple(range(len(self.order))):
            object.__setattr__(self, "order", ())  # one value per effect, or samples would hold duplicates

    def apply_grid(self, grid: Grid) -> Grid:
        return as_grid(np.array(self.colours, dtype=np.uint8)[self.turn(grid)])

    def turn(self, cells: Shaped[np.ndarray, "rows cols *more"]) -> Shaped[np.ndarray, "_rows _cols *more"]:
        """The symmetry alone, of whatever stands in the cells of a grid."""
        turns, transposed = SYMMETRIES[self.symmetry]
        turned = np.rot90(cells, turns)
        return turned.swapaxes(0, 1) if transposed else turned

    def invert(self, grid: Grid) -> Grid:
        """The grid that `apply_grid` would have turned into this one."""
        return self.inverse().apply_grid(grid)

    def apply(self, task: Task) -> Task:
        order = self.order or tuple(range(len(task.train)))
        if len(order) != len(task.train):
            raise InputError(f"task {task.id}: order of {len(order)} pairs, expected {len(task.train)}")
        train = tuple(self._pair(task.train[index]) for index in order)
        return replace(task, train=train, test=tuple(self._pair(pair) for pair in task.test))

    def _pair(self, pair: Pair) -> Pair:
        return Pair(self.apply_grid(pair.input), None if pair.output is None else self.apply_grid(pair.output))

    def inverse(self) -> "Augmentation":
        turns, transposed = SYMMETRIES[self.symmetry]
        # a reflection is its own inverse
        symmetry = self.symmetry if transposed else _NAMES[(-turns % 4, False)]
        return Augmentation(symmetry, _inverted(self.colours), _inverted(self.order))

    def then(self, other: "Augmentation") -> "Augmentation":
        """This one first: `other.apply(self.apply(task)) == self.then(other).apply(task)`."""
        if self.order and other.order and len(self.order) != len(other.order):
            raise InputError(f"order: found {len(self.order)} and {len(other.order)} pairs, expected the same number")
        (turns, transposed), (more, again) = SYMMETRIES[self.symmetry], SYMMETRIES[other.symmetry]
        # turning after a transposition turns the other way before it
        symmetry = _NAMES[((turns + (-more if transposed else more)) % 4, transposed != again)]
        colours = tuple(other.colours[colour] for colour in self.colours)
        first = self.order or tuple(range(len(other.order)))
        order = tuple(first[index] for index in other.order) if other.order else self.order
        return Augmentation(symmetry, colours, order)

    def __str__(self) -> str:
        words = [self.symmetry] if self.symmetry != "identity" else []
        words += ["colours=" + "".join(map(str, self.colours))] if self.colours != KEPT else []
        words += ["order=" + ",".join(map(str, self.order))] if self.order else []
        return " ".join(words) or "identity"

    @classmethod
    def parse(cls, text: str) -> "Augmentation":
        """Read what `str` wrote."""
        fields: dict[str, str] = {}
        for word in text.split():
            name, _, value = word.partition("=") if "=" in word else ("symmetry", "", word)
            if name in fields or name not in ("symmetry", "colours", "order"):
                raise InputError(f"augmentation {text!r}: found {word!r}, expected a symmetry, colours=…, order=…")
            fields[name] = value
        if not fields:
            raise InputError(f"augmentation {text!r}: found nothing, expected for example 'identity'")
        colours = tuple(map(_number, fields.get("colours", "0123456789")))
        order = tuple(map(_number, fields["order"].split(","))) if "order" in fields else ()
        return cls(fields.get("symmetry", "identity"), colours, order)


IDENTITY = Augmentation()


def _inverted(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 4:
        raise InputError(f"augmentation: found {text[:20]!r}, expected a number")
    return int(text)


def sample(
    rng: np.random.Generator,
    *,
    pairs: int = 0,
    symmetries: bool = True,
    colours: bool = True,
    keep_background: bool = True,
) -> Augmentation:
    """One augmentation, uniformly; `pairs` is the number of training pairs to shuffle, 0 leaves their order."""
    symmetry = list(SYMMETRIES)[rng.integers(8)] if symmetries else "identity"
    fixed = (0,) if keep_background else ()
    movable = [colour for colour in KEPT if colour not in fixed]
    palette = (*fixed, *map(int, rng.permutation(movable))) if colours else KEPT
    return Augmentation(symmetry, palette, tuple(map(int, rng.permutation(pairs))))


def sample_many(
    rng: np.random.Generator,
    count: int,
    *,
    pairs: int = 0,
    symmetries: bool = True,
    colours: bool = True,
    keep_background: bool = True,
    identity_first: bool = True,
) -> tuple[Augmentation, ...]:
    """`count` different augmentations; by default the first is the task as it stands."""
    palettes = math.factorial(COLOURS - keep_background) if colours else 1
    size = (8 if symmetries else 1) * palettes * math.factorial(pairs)
    if not 0 <= count <= size:
        raise InputError(f"count={count}: expected 0 to {size}, the number of different augmentations")
    chosen: dict[Augmentation, None] = {IDENTITY: None} if identity_first else {}
    options = {"pairs": pairs, "symmetries": symmetries, "colours": colours, "keep_background": keep_background}
    while len(chosen) < count:
        chosen[sample(rng, **options)] = None
    return tuple(islice(chosen, count))
