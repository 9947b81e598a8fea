"""Prompts as a plain pass reads them: one row or many, checked, padded on the right to one of few widths, and cut again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Shaped

from qwen_eqx.errors import InputError
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.text.ids import bucket, check_ids, pad_right

Prompts = Sequence[Any] | Shaped[Array | np.ndarray, "..."]  # of ids, of rows of ids, or an array of either


@dataclasses.dataclass(frozen=True)
class Rows:
    """Right-padded rows; the lengths are known even where the ids are traced."""

    tokens: Int[Array | np.ndarray, "batch width"]
    lengths: Int[np.ndarray, " batch"]
    single: bool  # one sequence was given, not a batch of one

    @classmethod
    def of(cls, prompts: Prompts, config: QwenConfig) -> "Rows":
        """Raises `InputError` for ids outside the vocabulary, rows without tokens and rows longer than the model.

        Ids that are traced cannot be looked at, nor which of them are pads: they are taken as they stand.
        """
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(prompts)):
            return cls._traced(prompts)
        if getattr(prompts, "ndim", 1) not in (1, 2):
            raise InputError(f"prompts: found an array of shape {np.shape(prompts)}, expected [seq] or [batch, seq]")
        listed = list(np.asarray(prompts)) if hasattr(prompts, "__array__") else _listed(prompts)
        single = not listed or (np.ndim(listed[0]) == 0 and not isinstance(listed[0], str))
        named = {"prompts": listed} if single else {f"prompts[{n}]": row for n, row in enumerate(listed)}
        rows = [_checked(row, config, name) for name, row in named.items()]
        lengths = np.asarray([len(row) for row in rows], np.int32)
        return cls(pad_right(rows, bucket(int(lengths.max())), 0), lengths, single)

    @classmethod
    def _traced(cls, prompts: Prompts) -> "Rows":
        try:
            tokens = jnp.asarray(prompts)
        except (TypeError, ValueError):
            raise InputError("prompts: found traced rows of several lengths, expected one length") from None
        if tokens.ndim not in (1, 2) or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise InputError(
                f"prompts: found {tokens.dtype.name}{list(tokens.shape)}, expected ids [seq] or [batch, seq]"
            )
        single = tokens.ndim == 1
        tokens = tokens[None] if single else tokens
        if not tokens.shape[1]:
            raise InputError("prompts: found no token, expected at least one")
        return cls(tokens, np.full(tokens.shape[0], tokens.shape[1], np.int32), single)

    def cut(self, value: Shaped[Array, "batch ..."], *, square: bool = False) -> Shaped[Array, "..."]:
        """What was made of the rows without the columns that all of them lack; that of a single sequence alone.

        The columns are the second axis, or in a square the last two.
        """
        within = slice(int(self.lengths.max()))
        kept = (0 if self.single else slice(None), *((..., within, within) if square else (within,)))
        if isinstance(value, Tracer) or value.committed or next(iter(value.devices())).platform != "cpu":
            return value[kept]
        # the same memory where it can be, and in no case a compilation for each new length
        return jax.device_put(np.asarray(value)[kept], may_alias=True)


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InputError(f"prompts: found a {type(prompts).__name__}, expected token ids or a list of rows of them")
    return list(prompts)


def _checked(row: Any, config: QwenConfig, name: str) -> list[int]:
    if isinstance(row, str):
        raise InputError(f"{name}: found text, expected token ids; tokenizer.encode(text) makes them")
    ids = check_ids(row, config.vocab, name=name)
    _check_length(len(ids), config, name)
    return ids


def _check_length(length: int, config: QwenConfig, name: str) -> None:
    if not length:
        raise InputError(f"{name}: found no token, expected at least one")
    if length > config.max_seq:
        raise InputError(f"{name}: found {length} tokens, expected at most {config.max_seq}, which the model holds")
