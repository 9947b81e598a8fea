"""What a model writes after prompts, and how it reads as a grid."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

import arc
import qwen_eqx
from arc.ask import Request
from arc.task import same


def generate(
    model: qwen_eqx.Qwen,
    tokenizer: qwen_eqx.Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    capture: qwen_eqx.Capture | None = None,
    edits: Sequence[qwen_eqx.AbstractEdit] = (),
) -> qwen_eqx.Generation:
    """`qwen_eqx.generate`, greedily, that stops and pads with the tokenizer's own tokens."""
    return qwen_eqx.generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_tokens=tokenizer.eos_ids,
        pad_token=tokenizer.pad_id,
        capture=capture,
        edits=edits,
    )


def tokens_of(out: qwen_eqx.Generation, row: int) -> Int32[np.ndarray, " new"]:
    """What one row wrote, its stop token included, without pads."""
    return np.asarray(out.tokens[row, : int(out.lengths[row])])


def read(out: qwen_eqx.Generation, row: int, request: Request, tokenizer: qwen_eqx.Tokenizer) -> arc.Sample:
    """What one row answered to a request."""
    return as_sample(request, tokens_of(out, row), float(out.log_probs[row].sum()), tokenizer)


def as_sample(
    request: Request, tokens: Int32[np.ndarray, " new"], log_prob: float, tokenizer: qwen_eqx.Tokenizer
) -> arc.Sample:
    """The tokens as text, and the text as a grid or the reason why it is none."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return arc.ask.read(request, arc.Completion(text, log_prob))


def outcome(sample: arc.Sample, task: arc.Task) -> str:
    """Why it did not parse, else `correct`, `wrong`, or `parsed` where the true answer is not known."""
    if sample.grid is None:
        return str(sample.parsed.reason)
    truth = task.test[sample.test].output
    return "parsed" if truth is None else "correct" if same(sample.grid, truth) else "wrong"
