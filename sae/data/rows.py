"""Rows of a store: activations with what each of them is."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from sae import shown
from sae.data.plan import Manifest
from sae.files import numpy_dtype


class Rows(NamedTuple):
    """Activations with what each row is: its token, position in the sequence, item of the plan, prompt or generated."""

    activations: Float[np.ndarray | jax.Array, "*rows sites d_model"]
    token_ids: Int32[np.ndarray | jax.Array, "*rows"]
    positions: Int32[np.ndarray | jax.Array, "*rows"]
    item: Int32[np.ndarray | jax.Array, "*rows"]
    generated: Bool[np.ndarray | jax.Array, "*rows"]

    def __repr__(self) -> str:
        return shown.by_field(self)

    @classmethod
    def none(cls, manifest: Manifest) -> "Rows":
        """Of an item that had no prompt."""
        empty = np.empty(0, np.int32)
        shape = (0, len(manifest.sites), manifest.d_model)
        return cls(np.empty(shape, numpy_dtype(manifest.dtype)), empty, empty, empty, np.empty(0, bool))

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
