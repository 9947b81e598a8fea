"""Rows of a store: activations with what each of them is."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int8, Int32

from sae import shown
from sae.data.plan import Manifest
from sae.errors import InputError
from sae.files import numpy_dtype


class Rows(NamedTuple):
    """Activations with what each row is: its token, position in the sequence, item of the plan, prompt or generated.

    A store's manifest says which of the other columns it has: the cell of a puzzle that the token stands in.
    """

    activations: Float[np.ndarray | jax.Array, "*rows sites d_model"]
    token_ids: Int32[np.ndarray | jax.Array, "*rows"]
    positions: Int32[np.ndarray | jax.Array, "*rows"]
    item: Int32[np.ndarray | jax.Array, "*rows"]
    generated: Bool[np.ndarray | jax.Array, "*rows"]
    pair: Int8[np.ndarray | jax.Array, "*rows"] | None = None  # of the document, from 0; −1: in none
    part: Int8[np.ndarray | jax.Array, "*rows"] | None = None  # 0 none, 1 input, 2 output
    row: Int8[np.ndarray | jax.Array, "*rows"] | None = None  # of the grid; −1: no cell, here and below
    col: Int8[np.ndarray | jax.Array, "*rows"] | None = None
    colour: Int8[np.ndarray | jax.Array, "*rows"] | None = None

    def __repr__(self) -> str:
        return f"Rows({', '.join(f'{name}={shown.short(column)}' for name, column in self.columns.items())})"

    @property
    def columns(self) -> dict[str, np.ndarray | jax.Array]:
        """The columns that are there, by name."""
        return {name: column for name, column in self._asdict().items() if column is not None}

    @classmethod
    def concatenate(cls, parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts, one part after the other."""
        names = list(parts[0].columns)
        for part in parts:
            if list(part.columns) != names:
                raise InputError(f"rows: found columns {', '.join(part.columns)}, expected {', '.join(names)} in all")
        return cls(**{name: np.concatenate([part.columns[name] for part in parts]) for name in names})

    @classmethod
    def none(cls, manifest: Manifest) -> "Rows":
        """Of an item that had no prompt."""
        return cls(**{name: np.empty(shape, numpy_dtype(dtype)) for name, (dtype, shape) in manifest.layout(0).items()})

    @classmethod
    def of_sequence(
        cls,
        prompt: Sequence[int],
        tokens: Sequence[int] | np.ndarray,
        item: int,
        activations: Float[Array | np.ndarray, "sites new d_model"],
        prompt_activations: Float[Array | np.ndarray, "sites prompt d_model"] | None = None,
    ) -> "Rows":
        """Of one prompt and the tokens that followed: the activation at a position, with the token read there.

        `activations[:, t]` produced token t, so it stands one position before it; `prompt_activations` are
        right-aligned, and without them only positions that produced a token are kept. `generated` marks positions whose
        logits chose a token: the last one of the prompt and all but the last one after it.
        """
        length = len(tokens)
        read = np.asarray([*prompt, *tokens[: length - 1]], np.int32)
        kept = np.asarray(activations[:, :length])
        start = len(prompt) - 1
        if prompt_activations is not None:  # its last position is the one that produced token 0, already kept
            width = prompt_activations.shape[1]
            kept = np.concatenate([np.asarray(prompt_activations[:, width - len(prompt) : width - 1]), kept], axis=1)
            start = 0
        place = np.arange(start, len(read), dtype=np.int32)
        items = np.full(len(place), item, np.int32)
        return cls(kept.transpose(1, 0, 2), read[start:], place, items, place >= len(prompt) - 1)
