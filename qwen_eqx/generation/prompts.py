"""Prompts as the model reads them: checked rows of ids, padded on the left to one of few widths."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, Key

from qwen_eqx.errors import InputError
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.text.ids import bucket, check_ids

PREFILL_CHUNK = 512  # positions of a long prompt that are read at once
Prompts = Sequence[Sequence[int]] | Int[Array | np.ndarray, "prompts prompt"]


class PromptBatch(eqx.Module):
    """What `Generator.prefill` reads: left-padded prompts, and a key for every row that continues one."""

    tokens: Int[Array, "prompts prompt"]
    lengths: Int[Array, " prompts"]
    keys: Key[Array, " batch"]  # batch = n · prompts: n rows continue each prompt, and stand together


def prompt_rows(
    prompts: Prompts, config: QwenConfig, max_new_tokens: int, pad_token: int | None = None, *, first: int = 0
) -> list[list[int]]:
    """The prompts without padding, numbered from `first` and checked: ids known, not empty, short enough for the model."""
    rows = []
    for number, prompt in enumerate(np.asarray(prompts) if hasattr(prompts, "__array__") else prompts, first):
        if hasattr(prompts, "__array__"):  # a left-padded batch
            real = np.asarray(prompt)
            pads = (real < 0) if pad_token is None else (real < 0) | (real == pad_token)
            prompt = real[int(np.argmin(pads)) if pads.any() else 0 :] if not pads.all() else real[:0]
        row = check_ids(prompt, config.vocab, name=f"prompts[{number}]")
        if not row:
            raise InputError(f"prompts[{number}]: found no token, expected at least one")
        if len(row) + max_new_tokens > config.max_seq:
            raise InputError(
                f"prompts[{number}]: found {len(row)} tokens, expected at most {config.max_seq - max_new_tokens}: "
                f"the model holds {config.max_seq}, max_new_tokens={max_new_tokens}; nothing is ever truncated"
            )
        rows.append(row)
    return rows


def prompt_width(longest: int, prefill_chunk: int = PREFILL_CHUNK) -> int:
    """Positions that prompts are padded to: a bucket, or a multiple of the chunk where they are read in chunks."""
    width = bucket(longest)
    return width if width <= prefill_chunk else -(-longest // prefill_chunk) * prefill_chunk
