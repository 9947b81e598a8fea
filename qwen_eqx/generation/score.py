"""Log-probabilities of given completions, reading what they have in common once."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from qwen_eqx import sharding
from qwen_eqx.errors import InputError, positive
from qwen_eqx.generation.memory import MemoryPlan
from qwen_eqx.generation.prompts import PREFILL_CHUNK, prompt_rows, prompt_width
from qwen_eqx.model.cache import KVCache
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.room import free_device_bytes
from qwen_eqx.text.ids import bucket, check_ids, pad_left, pad_right

_POSITIONS = 16  # logits are made for this many positions at a time: a whole row of them would be gigabytes


def score(
    model: Qwen,
    prompt: Sequence[int] | Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
) -> list[Float32[np.ndarray, " _"]]:
    """log p(token | prompt, tokens before) of every token of every completion; sum for a completion's log-probability.

    `prompt` is one prompt for all completions, or one for each. The longest common prefix of all of them is read once.
    """
    positive("batch_size", batch_size)
    single = all(isinstance(token, int | np.integer) for token in prompt)
    prompts = [prompt] * len(completions) if single else list(prompt)
    if len(prompts) != len(completions):
        raise InputError(f"prompt: found {len(prompts)} prompts, expected one, or one for each of {len(completions)}")
    answers = [check_ids(row, model.config.vocab, name=f"completions[{n}]") for n, row in enumerate(completions)]
    longest = max(map(len, answers), default=0)
    asked = prompt_rows(prompts, model.config, max(longest, 1))  # pyright: ignore[reportArgumentType]
    shared = _shared_prefix([row + answer for row, answer in zip(asked, answers, strict=True)], asked)
    rests = [row[shared:] + answer for row, answer in zip(asked, answers, strict=True)]
    seq = bucket(max(map(len, rests), default=1))
    mesh = sharding.mesh_of(model)
    batch_size += sharding.rows_lacking(batch_size, mesh)
    plan = MemoryPlan.of(
        sharding.share(model.config, mesh),
        batch=sharding.rows_share(batch_size, mesh),
        kv_seq=shared + seq,
        cache_dtype=model.dtype,
    )
    plan.check_fits(free_device_bytes(mesh and mesh.local_devices), lower="batch_size")
    past = _read_prefix(model, asked[0][:shared]) if shared else None
    results = []
    for at in range(0, len(rests), batch_size):
        batch = rests[at : at + batch_size]
        tokens = pad_right([*batch, *[[]] * (batch_size - len(batch))], seq, 0)
        log_probs = np.asarray(_score(model, past, sharding.place_rows(jnp.asarray(tokens), mesh), mesh))
        for row, rest in enumerate(batch):
            length = len(answers[at + row])
            results.append(log_probs[row, len(rest) - length - 1 : len(rest) - 1])
    return results


def _shared_prefix(rows: list[list[int]], prompts: list[list[int]]) -> int:
    """Tokens that all rows begin with, at least one token short of every prompt: its last one predicts the answer."""
    shared = min((len(prompt) - 1 for prompt in prompts), default=0)
    for row in rows[1:]:
        agree = next((n for n, (a, b) in enumerate(zip(row, rows[0], strict=False)) if a != b), len(row))
        shared = min(shared, agree)
    return shared


def _read_prefix(model: Qwen, prefix: list[int]) -> KVCache:
    width = prompt_width(len(prefix), PREFILL_CHUNK)
    chunk = min(width, PREFILL_CHUNK)
    tokens = jnp.asarray(pad_left([prefix], width, 0))
    return _prefix_cache(model, tokens, jnp.asarray([len(prefix) - width], jnp.int32), chunk)


@eqx.filter_jit
def _prefix_cache(model: Qwen, tokens: Int[Array, "1 prompt"], start: Int[Array, " 1"], chunk: int) -> KVCache:
    width = tokens.shape[1]
    if width == chunk:
        return model.forward(tokens, start)[1]
    cache = KVCache.init(model.config, batch=1, kv_seq=width, dtype=model.dtype)
    cache = eqx.tree_at(lambda c: c.length, cache, start)

    def read(i: Int[Array, ""], cache: KVCache) -> KVCache:
        part = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        return model.forward(part, cache.length, cache)[1]

    return jax.lax.fori_loop(0, width // chunk, read, cache)


@eqx.filter_jit
def _score(
    model: Qwen, prefix: KVCache | None, tokens: Int[Array, "batch seq"], mesh: Mesh | None
) -> Float32[Array, "batch seq-1"]:
    """The log-probability of each token after the first, given those before it."""
    if not sharding.deals(tokens.shape[0], mesh):
        return _score_rows(model, prefix, tokens)
    given = {name: (whole, sharding.specs(whole, [])) for name, whole in (("model", model), ("prefix", prefix))}
    return sharding.by_rows(_score_rows, mesh, given | {"tokens": (tokens, sharding.ROWS)}, sharding.ROWS)


def _score_rows(model: Qwen, prefix: KVCache | None, tokens: Int[Array, "batch seq"]) -> Float32[Array, "batch seq-1"]:
    batch, seq = tokens.shape
    if prefix is None:
        x, _ = model.forward(tokens, jnp.zeros(batch, jnp.int32))
    else:
        room = KVCache.init(model.config, batch=1, kv_seq=prefix.kv_seq + seq, dtype=model.dtype)
        past = prefix.grown(room)
        past = jax.tree.map(lambda leaf: jnp.repeat(leaf, batch, axis=0) if leaf.ndim else leaf, past)
        x, _ = model.forward(tokens, past.length, past)
    return _token_log_probs(model, x[:, :-1], tokens[:, 1:])


def _token_log_probs(
    model: Qwen, x: Float[Array, "batch seq d_model"], tokens: Int[Array, "batch seq"]
) -> Float32[Array, "batch seq"]:
    batch, seq = tokens.shape
    more = -seq % _POSITIONS
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0))).reshape(batch, -1, _POSITIONS, x.shape[-1]).swapaxes(0, 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, more))).reshape(batch, -1, _POSITIONS).swapaxes(0, 1)

    def one(piece):
        logits = model.logits(piece[0])
        chosen = jnp.take_along_axis(logits, piece[1][:, :, None], axis=-1)[:, :, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(one, (x, tokens)).swapaxes(0, 1).reshape(batch, -1)[:, :seq]
