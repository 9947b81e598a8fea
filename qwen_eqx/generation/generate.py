"""`generate`: prompts in, tokens, log-probabilities and activations out, through one compiled function per shape."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from qwen_eqx import sharding, shown
from qwen_eqx.errors import InputError
from qwen_eqx.generation.buffer import ActivationBuffer
from qwen_eqx.generation.engine import Generator
from qwen_eqx.generation.options import Options, Settings, by_keyword
from qwen_eqx.generation.progress import Asked, check_progress, report, watching
from qwen_eqx.generation.prompts import PromptBatch, Prompts, prompt_rows, prompt_width
from qwen_eqx.generation.sample import row_keys
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.edits import check_positions, for_more_rows
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.text.ids import pad_left


class Generation(eqx.Module):
    """What `generate` returns; with several samples the rows of one prompt stand together."""

    tokens: Int[Array, "batch new"]  # the pad token after the stop
    lengths: Int[Array, " batch"]  # generated tokens up to and including the stop token
    log_probs: Float32[Array, "batch new"]  # natural logarithm, under the model before any filter; 0 after the stop
    activations: Float[Array, "sites batch new d_model"] | None  # index t produced token t; 0 after the stop
    prompt_activations: Float[Array, "sites prompts prompt d_model"] | None  # right-aligned; 0 at pads

    def __repr__(self) -> str:
        return shown.by_field(self)

    def _repr_html_(self) -> str | None:
        held = [shown.values_of(each) for each in (self.tokens, self.lengths, self.log_probs)]
        if any(each is None or each.ndim != ndim for each, ndim in zip(held, (2, 1, 2), strict=True)):
            return None  # a skeleton, or a tree of anything that has this shape
        rows = [
            (row[:length].tolist(), logs[:length].tolist(), float(logs[:length].sum()))
            for row, length, logs in zip(*held, strict=True)
        ]
        facts = {"rows": str(len(rows)), "activations": self.activations, "prompts": self.prompt_activations}
        return shown.generated("Generation", facts, rows)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GenerateOptions(Options):
    """The keywords of `generate`: those of `prepare`, and this."""

    progress: Asked = None
    """True writes a line on stderr: tokens, tok/s, time left. A function is called with a `Progress` every few steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_progress(self.progress)


@by_keyword(GenerateOptions)
def generate(model: Qwen, prompts: Prompts, options: GenerateOptions) -> Generation:
    """Continues every prompt by at most `max_new_tokens` tokens, `samples` times.

    The keywords are the fields of `GenerateOptions`.

    `prompts` is a list of lists of token ids, or a left-padded array whose pads are `pad_token` or negative. A row ends with
    one of `stop_tokens` or with one of `stop_sequences`, and is filled up with `pad_token` (0 if none is given). Rows never
    influence one another: what is drawn for a prompt depends on `key`, its number in `items` (default: its place) and the
    sample's number alone. One compilation per batch size, prompt bucket, `max_new_tokens` and set of sites; with `progress`
    another one, whose results are the same bit for bit. A function given for it must not call JAX, which waits for it, and
    what it raises is raised here, once all is generated.

    Raises `InputError` for ids outside the vocabulary, prompts that do not fit the model, unknown sites, and buffers that
    exceed free memory.
    """
    generator, batch = _prepared(model, prompts, options)
    asked, width = batch.tokens.shape
    if not asked:
        return _nothing(model.config, generator.settings, width)
    generator, batch = _filled(generator, batch)
    batch = sharding.place_rows(batch, generator.settings.mesh)
    rows = asked * options.samples
    with watching(options.progress, rows=rows, max_steps=options.max_new_tokens) as watcher:
        out = _generate(model, generator, batch, watcher, None if watcher is None else rows)
    if len(batch.lengths) > asked:
        out = _cut(out, prompts=asked, rows=rows)
    activations = None if out.buffer is None else out.buffer.values
    return Generation(out.tokens, out.lengths, out.log_probs, activations, out.prompt_activations)


class _Outputs(NamedTuple):
    """A `Generation` whose activations are still bits: they are viewed as floats outside of what is compiled."""

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    log_probs: Float32[Array, "batch new"]
    buffer: ActivationBuffer | None
    prompt_activations: Float[Array, "sites prompts prompt d_model"] | None


@eqx.filter_jit
def _generate(
    model: Qwen, generator: Generator, batch: PromptBatch, watcher: Int[Array, ""] | None, watched: int | None
) -> _Outputs:
    state, prompt_activations = generator.prefill(model, batch)
    if watcher is not None:
        report(watcher, state.column, state.length[:watched], state.done[:watched])
    state = generator.loop(model, state, watcher, watched)
    if watcher is not None:
        report(watcher, state.column, state.length[:watched], state.done[:watched])
    return _Outputs(state.tokens, state.length, state.log_probs, state.buffer, prompt_activations)


@by_keyword(Options)
def prepare(model: Qwen, prompts: Prompts, options: Options) -> tuple[Generator, PromptBatch]:
    """The checked arguments of `generate` as a `Generator` and what its `prefill` reads, to go on by hand:

    `state, _ = generator.prefill(model, batch)`, then `state = eqx.filter_jit(generator.step)(model, state)`.
    """
    generator, batch = _prepared(model, prompts, options)
    return generator, sharding.place_rows(batch, generator.settings.mesh)


def _prepared(model: Qwen, prompts: Prompts, options: Options) -> tuple[Generator, PromptBatch]:
    rows = prompt_rows(prompts, model.config, options.max_new_tokens, options.pad_token)
    width = prompt_width(max(map(len, rows), default=1), options.prefill_chunk)
    generator = Generator.init(model, options, prompts=len(rows), width=width, samples=options.samples)
    # a position that some row reaches may be beyond another one's end: who stops early stops before it
    longest = max(map(len, rows), default=0) + options.max_new_tokens
    check_positions(generator.edits, np.full(len(rows), longest))
    if options.items is not None and len(options.items) != len(rows):
        count = len(options.items)
        raise InputError(f"items: found {count} numbers, expected one for each of the {len(rows)} prompts")
    numbers = np.asarray([options.number(place) for place in range(len(rows))], np.uint32)
    samples = np.tile(np.arange(options.samples), len(rows))
    return generator, PromptBatch(
        tokens=jnp.asarray(pad_left(rows, width, generator.settings.pad_token)),
        lengths=jnp.asarray([len(row) for row in rows], jnp.int32),
        keys=row_keys(options.key, np.repeat(numbers, options.samples), samples),
    )


def _filled(generator: Generator, batch: PromptBatch) -> tuple[Generator, PromptBatch]:
    """As many rows for every device: copies of the first prompt, which end when it does, and are dropped."""
    prompts, rows = len(batch.lengths), batch.keys.shape[0]
    samples = rows // prompts
    more = sharding.rows_lacking(prompts, generator.settings.mesh, samples)
    if not more:
        return generator, batch
    of_prompts = np.r_[0:prompts, [0] * more]
    of_rows = np.r_[0:rows, np.tile(np.arange(samples), more)]
    filled = PromptBatch(batch.tokens[of_prompts], batch.lengths[of_prompts], batch.keys[of_rows])
    return dataclasses.replace(generator, edits=for_more_rows(generator.edits, more)), filled


def _cut(out: _Outputs, *, prompts: int, rows: int) -> _Outputs:
    """Without the rows that were filled up."""
    buffer = None if out.buffer is None else out.buffer.first(rows)
    prompt_activations = jax.tree.map(lambda kept: kept[:, :prompts], out.prompt_activations)
    return _Outputs(out.tokens[:rows], out.lengths[:rows], out.log_probs[:rows], buffer, prompt_activations)


def _nothing(config: QwenConfig, settings: Settings, width: int) -> Generation:
    def kept(asked: bool, positions: int) -> Float[Array, "sites 0 positions d_model"] | None:
        shape = (len(settings.sites), 0, positions, config.d_model)
        return jnp.zeros(shape, settings.capture_dtype) if asked else None

    return Generation(
        jnp.zeros((0, settings.new), jnp.int32),
        jnp.zeros(0, jnp.int32),
        jnp.zeros((0, settings.new), jnp.float32),
        kept(settings.keep_generated, settings.new),
        kept(settings.keep_prompt, width),
    )
