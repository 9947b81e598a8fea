"""`generate`: prompts in, tokens, log-probabilities and activations out, through one compiled function per shape."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Integer, Key, PRNGKeyArray

from qwen_eqx.errors import InputError, positive
from qwen_eqx.generation.engine import Generator, Settings
from qwen_eqx.generation.memory import MemoryPlan, free_device_bytes
from qwen_eqx.generation.sample import AbstractSampler, Greedy
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.edits import AbstractEdit, resolve_edits
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import Capture
from qwen_eqx.text.ids import bucket, check_ids, pad_left

PREFILL_CHUNK = 512  # positions of a long prompt that are read at once
_STRIDE = 32


class Generation(eqx.Module):
    """What `generate` returns; with several samples the rows of one prompt stand together."""

    tokens: Int[Array, "batch new"]  # the pad token after the stop
    lengths: Int[Array, " batch"]  # generated tokens up to and including the stop token
    log_probs: Float32[Array, "batch new"]  # natural logarithm, under the model before any filter; 0 after the stop
    activations: Float[Array, "sites batch new d_model"] | None  # index t produced token t; 0 after the stop
    prompt_activations: Float[Array, "sites prompts prompt d_model"] | None  # right-aligned; 0 at pads


def generate(
    model: Qwen,
    prompts: Sequence[Sequence[int]] | Int[Array | np.ndarray, "prompts prompt"],
    *,
    max_new_tokens: int,
    sampler: AbstractSampler = Greedy(),  # noqa: B008  (frozen, without arrays)
    stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    capture: Capture | None = None,
    edits: Sequence[AbstractEdit] = (),
    key: PRNGKeyArray | None = None,
    samples: int = 1,
    items: Sequence[int] | None = None,
    pad_token: int | None = None,
    cache_dtype: DTypeLike | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Generation:
    """Continues every prompt by at most `max_new_tokens` tokens, `samples` times.

    `prompts` is a list of lists of token ids, or a left-padded array whose pads are `pad_token` or negative. A row ends with
    one of `stop_tokens` or with one of `stop_sequences`, and is filled up with `pad_token` (0 if none is given). Rows never
    influence one another: what is drawn for a prompt depends on `key`, its number in `items` (default: its place) and the
    sample's number alone. One compilation per batch size, prompt bucket, `max_new_tokens` and set of sites.

    Raises `InputError` for ids outside the vocabulary, prompts that do not fit the model, unknown sites, and buffers that
    exceed free memory.
    """
    generator, inputs = prepare(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        capture=capture,
        edits=edits,
        key=key,
        samples=samples,
        items=items,
        pad_token=pad_token,
        cache_dtype=cache_dtype,
        prefill_chunk=prefill_chunk,
    )
    if not inputs["tokens"].shape[0]:
        return _nothing(model.config, generator.settings, inputs["tokens"].shape[1])
    tokens, lengths, log_probs, buffer, prompt_activations = _generate(model, generator, **inputs)
    return Generation(tokens, lengths, log_probs, None if buffer is None else buffer.values, prompt_activations)


@eqx.filter_jit
def _generate(
    model: Qwen,
    generator: Generator,
    tokens: Int[Array, "prompts prompt"],
    lengths: Int[Array, " prompts"],
    keys: Key[Array, " batch"],
):
    state, prompt_activations = generator.prefill(model, tokens, lengths, keys)
    state = generator.loop(model, state)
    return state.tokens, state.length, state.log_probs, state.buffer, prompt_activations


def prepare(
    model: Qwen,
    prompts: Sequence[Sequence[int]] | Int[Array | np.ndarray, "prompts prompt"],
    *,
    max_new_tokens: int,
    sampler: AbstractSampler = Greedy(),  # noqa: B008
    stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    capture: Capture | None = None,
    edits: Sequence[AbstractEdit] = (),
    key: PRNGKeyArray | None = None,
    samples: int = 1,
    items: Sequence[int] | None = None,
    pad_token: int | None = None,
    cache_dtype: DTypeLike | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> tuple[Generator, dict[str, Any]]:
    """The checked arguments of `generate` as a `Generator` and the inputs of its `prefill`, to go on by hand:

    `state, _ = generator.prefill(model, **inputs)`, then `state = eqx.filter_jit(generator.step)(model, state)`.
    """
    config = model.config
    positive("max_new_tokens", max_new_tokens)
    positive("samples", samples)
    positive("prefill_chunk", prefill_chunk)
    rows = prompt_rows(prompts, config, max_new_tokens, pad_token)
    width = prompt_width(max(map(len, rows), default=1), prefill_chunk)
    settings = make_settings(
        model,
        new=max_new_tokens,
        kv_seq=width + max_new_tokens,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        capture=capture,
        pad_token=pad_token,
        cache_dtype=cache_dtype,
        prefill_chunk=prefill_chunk,
    )
    memory_plan(config, settings, len(rows), width, samples).check_fits(free_device_bytes())
    numbers = range(len(rows)) if items is None else items
    if len(numbers) != len(rows):
        raise InputError(f"items: found {len(numbers)} numbers, expected one for each of the {len(rows)} prompts")
    for number in numbers:
        if not 0 <= number < 2**32:
            raise InputError(f"items: found {number}, expected numbers from 0 to 2^32 - 1")
    inputs = {
        "tokens": jnp.asarray(pad_left(rows, width, settings.pad_token)),
        "lengths": jnp.asarray([len(row) for row in rows], jnp.int32),
        "keys": row_keys(
            key, np.repeat(np.asarray(numbers, np.uint32), samples), np.tile(np.arange(samples), len(rows))
        ),
    }
    return Generator(sampler, resolve_edits(edits, config), settings), inputs


def row_keys(
    key: PRNGKeyArray | None, items: Integer[np.ndarray, " batch"], samples: Integer[np.ndarray, " batch"]
) -> Key[Array, " batch"]:
    """One key per row, folded from (seed, item, sample): a sequence is the same alone, in any batch, in any order."""
    root = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(root.dtype, jax.dtypes.prng_key):
        root = jax.random.wrap_key_data(root)  # a key of jax.random.PRNGKey
    return _fold(root, jnp.asarray(items, jnp.uint32), jnp.asarray(samples, jnp.uint32))


@jax.jit
def _fold(
    root: PRNGKeyArray, items: Integer[Array, " batch"], samples: Integer[Array, " batch"]
) -> Key[Array, " batch"]:
    return jax.vmap(lambda item, sample: jax.random.fold_in(jax.random.fold_in(root, item), sample))(items, samples)


def make_settings(
    model: Qwen,
    *,
    new: int,
    kv_seq: int,
    stop_tokens: Sequence[int],
    stop_sequences: Sequence[Sequence[int]],
    capture: Capture | None,
    pad_token: int | None,
    cache_dtype: DTypeLike | None,
    prefill_chunk: int,
) -> Settings:
    """What is fixed when the loop is compiled, checked against the model."""
    sequences = tuple(tuple(check_ids(stop, model.config.vocab, name="stop_sequences")) for stop in stop_sequences)
    if () in sequences:
        raise InputError("stop_sequences: found an empty sequence, expected at least one token id")
    pad = check_ids([0 if pad_token is None or pad_token < 0 else pad_token], model.config.vocab, name="pad_token")[0]
    steps = max(new - 1, 1)
    return Settings(
        new=new,
        kv_seq=kv_seq,
        cache_dtype=jnp.dtype(model.dtype if cache_dtype is None else cache_dtype).name,
        stop_tokens=tuple(check_ids(stop_tokens, model.config.vocab, name="stop_tokens")),
        stop_sequences=sequences,
        pad_token=pad,
        sites=() if capture is None else capture.resolve(model.config),
        keep_generated=capture is not None and capture.positions != "prompt",
        keep_prompt=capture is not None and capture.positions != "generated",
        capture_dtype=jnp.dtype(model.dtype if capture is None or capture.dtype is None else capture.dtype).name,
        prefill_chunk=prefill_chunk,
        stride=-(-steps // -(-steps // _STRIDE)),  # near _STRIDE, overshooting max_new_tokens the least
    )


def memory_plan(config: QwenConfig, settings: Settings, prompts: int, width: int, samples: int = 1) -> MemoryPlan:
    """The bytes that a generation of this shape allocates beside the weights."""
    rows = prompts * samples
    positions = rows * settings.new * settings.keep_generated + prompts * width * settings.keep_prompt
    return MemoryPlan.of(
        config,
        batch=rows,
        kv_seq=settings.kv_seq,
        cache_dtype=settings.cache_dtype,
        sites=len(settings.sites),
        captured_positions=positions,
        capture_dtype=settings.capture_dtype,
    )


def prompt_rows(
    prompts: Sequence[Sequence[int]] | Int[Array | np.ndarray, "prompts prompt"],
    config: QwenConfig,
    max_new_tokens: int,
    pad_token: int | None,
    *,
    first: int = 0,
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
