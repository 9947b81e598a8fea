"""An array whose axes have names and whose places have labels."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Shaped

from qwen_eqx.errors import InputError


@dataclasses.dataclass(frozen=True)
class Labelled:
    """`values` with the label of every place along every axis: `labels["layer"]` names those along the axis of layers."""

    values: Shaped[np.ndarray, "..."]
    labels: dict[str, tuple[Any, ...]]  # in the order of the axes

    def __post_init__(self):
        found, expected = self.values.shape, tuple(map(len, self.labels.values()))
        if found != expected:
            raise InputError(
                f"Labelled.values: found shape {found}, expected {expected} by the labels {[*self.labels]}"
            )

    def __repr__(self) -> str:
        return f"Labelled({', '.join(f'{axis}={len(labels)}' for axis, labels in self.labels.items())})"

    def at(self, **chosen: Any) -> "Labelled":
        """What stands at these labels, without their axes: `heads.at(layer=1, head=3)`."""
        index: list[Any] = [slice(None)] * self.values.ndim
        for axis, label in chosen.items():
            labels = self.labels[self._known(axis)]
            if label not in labels:
                raise InputError(f"{axis}: found {label!r}, expected one of {labels}")
            index[list(self.labels).index(axis)] = labels.index(label)
        return Labelled(np.asarray(self.values[tuple(index)]), self._without(chosen))

    def sum(self, *axes: str) -> "Labelled":
        """The sum along these axes."""
        numbers = tuple(list(self.labels).index(self._known(axis)) for axis in axes)
        return Labelled(np.asarray(self.values.sum(axis=numbers)), self._without(axes))

    def top(self, k: int) -> list[tuple[dict[str, Any], float]]:
        """The k values of the greatest size, each with its labels."""
        order = np.argsort(-np.abs(self.values), axis=None, kind="stable")[:k]
        places = [np.unravel_index(flat, self.values.shape) for flat in order]
        names = [
            {axis: labels[at] for (axis, labels), at in zip(self.labels.items(), place, strict=True)}
            for place in places
        ]
        return [(name, float(self.values[place])) for name, place in zip(names, places, strict=True)]

    def _known(self, axis: str) -> str:
        if axis not in self.labels:
            raise InputError(f"axis: found {axis!r}, expected one of {', '.join(self.labels)}")
        return axis

    def _without(self, axes: Any) -> dict[str, tuple[Any, ...]]:
        return {axis: labels for axis, labels in self.labels.items() if axis not in axes}
