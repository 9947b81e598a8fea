"""Which items a run has read, eight bytes each: one that goes on over other data is told from one that goes on."""

import hashlib
import json
from typing import Any

import numpy as np

from qwen_lab.errors import InputError

_BYTES = 8


class Seen:
    """Items in the order in which they are read."""

    def __init__(self) -> None:
        self.marks = bytearray()

    def add(self, tokens: list[int], *said: Any) -> None:
        """An item: the tokens that are read of it, and plain values that say what it is."""
        data = np.asarray(tokens, "<i4").tobytes() + json.dumps(said, sort_keys=True).encode()
        self.marks += hashlib.sha256(data).digest()[:_BYTES]

    @property
    def said(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""
        items = len(self.marks) // _BYTES
        return {"items": items, "digest": self._digest(items)}

    def check(self, earlier: dict[str, Any], flags: str) -> None:
        """Raises unless these begin with the items of an earlier run; `flags` name them."""
        items = earlier.get("items")
        if not isinstance(items, int) or self._digest(items) != earlier.get("digest"):
            raise InputError(
                f"{flags}: found other items than this run began with, expected the same {items} first, or a new --out"
            )

    def _digest(self, items: int) -> str:
        return f"sha256:{hashlib.sha256(self.marks[: items * _BYTES]).hexdigest()}"
