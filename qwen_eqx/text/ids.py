"""Rows of token ids: checked, and padded to one of few lengths, so that few shapes are compiled."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from qwen_eqx.errors import InputError


def check_ids(ids: Any, vocab_size: int, *, name: str = "ids") -> list[int]:
    """A list or array of token ids as Python ints, refusing what is no id of the vocabulary."""
    try:
        checked = [operator.index(item) for item in (np.asarray(ids) if hasattr(ids, "__array__") else ids)]  # pyright: ignore
    except TypeError as error:
        raise InputError(f"{name}: found {error}, expected a flat list of whole numbers") from None
    for at, value in enumerate(checked):
        if not 0 <= value < vocab_size:
            raise InputError(f"{name}[{at}]: found {value}, expected a token id in 0..{vocab_size - 1}")
    return checked


def bucket(length: int) -> int:
    """The compiled length for a prompt: the next of 16, 24, 32, 48, … 256, 384, 512, 768, … (half the waste of 2^n)."""
    power = 16
    while power < length:
        if length <= power + power // 2:
            return power + power // 2
        power *= 2
    return power


def pad_left(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> Int[np.ndarray, "batch seq"]:
    """Rows of token ids as one int32 array, filled with `pad_id` on the left up to `length`."""
    padded = np.full((len(rows), length), pad_id, dtype=np.int32)
    for index, row in enumerate(rows):
        _check_room(index, row, length)
        padded[index, length - len(row) :] = row
    return padded


def pad_right(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> Int[np.ndarray, "batch seq"]:
    """The same filled on the right, where no pad reaches a token: no position sees a later one."""
    padded = np.full((len(rows), length), pad_id, dtype=np.int32)
    for index, row in enumerate(rows):
        _check_room(index, row, length)
        padded[index, : len(row)] = row
    return padded


def _check_room(index: int, row: Sequence[int], length: int) -> None:
    if len(row) > length:
        raise InputError(f"rows[{index}]: found {len(row)} tokens, expected at most length={length}")
