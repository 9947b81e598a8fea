"""A family of tasks: one rule with variants, of which the training pairs leave only what answers the test alike."""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from arc.errors import InputError
from arc.grid import MAX_SIDE, as_grid
from arc.task import Pair, Task, same

Draw = Callable[[np.random.Generator, int, int, Any], np.ndarray | None]
"""(rng, rows, cols, variant) -> an input at most that large, or None where none fits."""
Solve = Callable[[np.ndarray, Any], np.ndarray]
"""(input, variant) -> output."""
TRIES = 400
AND_THEN = "+"  # between the names of two families that are composed


@dataclass(frozen=True)
class Family:
    """A rule; `variants` is everything a solver could have to find out from the training pairs."""

    name: str
    rule: str
    draw: Draw
    solve: Solve
    variants: tuple[Any, ...] = (None,)

    def pair(self, rng: np.random.Generator, sides: tuple[int, int], variant: Any) -> Pair | None:
        """One pair on which the variant does something, or None."""
        rows, cols = (int(side) for side in rng.integers(sides[0], sides[1] + 1, size=2))
        drawn = self.draw(rng, rows, cols, variant)
        if drawn is None:
            return None
        answer = self.solve(drawn, variant)
        if same(answer, drawn) or max(*drawn.shape, *answer.shape) > sides[1]:
            return None
        return Pair(as_grid(drawn), as_grid(answer))

    def consistent(self, pairs: tuple[Pair, ...]) -> list[Any]:
        """The variants that turn every input into its output."""
        return [v for v in self.variants if all(same(self.solve(p.input, v), np.asarray(p.output)) for p in pairs)]

    def solvable(self, task: Task) -> bool:
        """Whether every variant that explains the training pairs gives the test outputs."""
        left = self.consistent(task.train)
        return bool(left) and all(
            same(self.solve(pair.input, variant), np.asarray(pair.output)) for variant in left for pair in task.test
        )

    def task(self, seed: int, *, sides: tuple[int, int] = (3, 10), train: int = 3, test: int = 1) -> Task:
        """The family's task number `seed`, every side of every grid at most `sides[1]`, solvable by construction."""
        if not (1 <= sides[0] <= sides[1] <= MAX_SIDE) or train < 1 or test < 1:
            raise InputError(f"family {self.name}: {sides=}, {train=}, {test=}, expected sides 1 to 30, pairs 1 up")
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), seed])
        for _ in range(TRIES):
            variant = self.variants[rng.integers(len(self.variants))]
            pairs = self._pairs(rng, sides, variant, train + test)
            if pairs is None:
                continue
            made = Task(f"{self.name}-{seed}", pairs[:train], pairs[train:])
            if self.solvable(made):
                return made
        raise InputError(f"family {self.name}: found no task within sides {sides} in {TRIES} tries, expected more room")

    def _pairs(
        self, rng: np.random.Generator, sides: tuple[int, int], variant: Any, number: int
    ) -> tuple[Pair, ...] | None:
        pairs: list[Pair] = []
        for _ in range(8 * number):
            pair = self.pair(rng, sides, variant)
            if pair is not None and all(not same(pair.input, other.input) for other in pairs):
                pairs.append(pair)
            if len(pairs) == number:
                return tuple(pairs)
        return None


def composed(first: Family, second: Family) -> Family:
    """One rule after another: the output of the first is the input of the second."""
    name = f"{first.name}{AND_THEN}{second.name}"
    rule = f"{first.rule.rstrip('.')}, and then: {second.rule}"
    return Family(
        name,
        rule,
        lambda rng, rows, cols, variant: first.draw(rng, rows, cols, variant[0]),
        lambda cells, variant: second.solve(first.solve(cells, variant[0]), variant[1]),
        tuple(itertools.product(first.variants, second.variants)),
    )
