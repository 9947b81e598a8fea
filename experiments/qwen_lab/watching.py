"""What the latents of a dictionary do while a model answers: puzzles in, a timeline of each answer out."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

import arc
import qwen_eqx
import sae
from qwen_lab import completions, lens, puzzles, timelines
from qwen_lab.places import Dictionary
from qwen_lab.prompts import Item
from qwen_lab.timelines import Timeline

RAISED = 3  # tokens that a latent is named by


def watch(
    model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, dictionaries: Sequence[Dictionary], items: Sequence[Item]
) -> list[list[Timeline]]:
    """Of each dictionary, a timeline for every item. The model answers once, greedily, with room for the right answer."""
    room = max(_room(item, tokenizer) for item in items)
    longest = max(len(item.tokens) for item in items)
    out = completions.generate(
        model, tokenizer, [item.tokens for item in items], max(1, min(room, model.config.max_seq - longest))
    )
    sites = list(dict.fromkeys(site for one in dictionaries for site in one.place.reads))
    watched: list[list[Timeline]] = [[] for _ in dictionaries]
    for row, item in enumerate(items):
        written = completions.tokens_of(out, row).tolist()
        acts = qwen_eqx.captured(model, [*item.tokens, *written[:-1]], sites)  # the last token is read by no step
        sample = completions.read(out, row, item.request, tokenizer)
        probabilities = np.exp(np.asarray(out.log_probs[row, : len(written)], np.float64))
        for one, kept in zip(dictionaries, watched, strict=True):
            codes = sae.encoded(one.module, one.read(acts))[len(item.tokens) - 1 :]
            kept.append(_timeline(item, sample, written, probabilities, codes, tokenizer))
    return watched


def named(
    model: qwen_eqx.Qwen, tokenizer: qwen_eqx.Tokenizer, dictionary: Dictionary, watched: Sequence[Timeline]
) -> dict[int, str]:
    """The tokens that each latent of these timelines raises most, where it writes the residual stream's width."""
    latents = np.unique(np.concatenate([each.latents[each.values > 0] for each in watched] or [np.zeros(0, int)]))
    *_, rows = dictionary.by_site(dictionary.module.decoder[jnp.asarray(latents, jnp.int32)]).values()
    raised = lens.effects(model, np.asarray(rows, np.float32))
    if raised is None:
        return {}
    best = np.argsort(-raised, axis=1, kind="stable")[:, :RAISED]
    told = (", ".join(repr(lens.token_text(tokenizer, token)) for token in row) for row in best.tolist())
    return {latent: f"raises {text}" for latent, text in zip(latents.tolist(), told, strict=True)}


def _room(item: Item, tokenizer: qwen_eqx.Tokenizer) -> int:
    """Tokens of the right answer and its end; of as large a grid as was asked where it is not known."""
    pair = item.task.test[item.test]
    grid = pair.input if pair.output is None else pair.output
    return len(tokenizer.encode(item.request.encoder.encode(grid))) + 4


def _timeline(
    item: Item,
    sample: arc.Sample,
    written: list[int],
    probabilities: np.ndarray,
    codes: np.ndarray,
    tokenizer: qwen_eqx.Tokenizer,
) -> Timeline:
    marks = puzzles.answered(item, written, sample.parsed.grid, {}, tokenizer).marks
    assert marks is not None
    answer = marks()
    rows, cols, parts = (column[len(item.tokens) :].tolist() for column in (answer.row, answer.col, answer.part))
    cells = [(row, col) if part else None for row, col, part in zip(rows, cols, parts, strict=True)]
    pieces = [lens.token_text(tokenizer, token) for token in written]
    said = completions.outcome(sample, item.task)
    return Timeline(item.task, item.test, said, sample.grid, pieces, cells, probabilities, *timelines.strongest(codes))
