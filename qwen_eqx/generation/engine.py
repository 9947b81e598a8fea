"""The compiled pieces of generation: read prompts, take a step, loop until all rows are done."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from qwen_eqx import sharding
from qwen_eqx.errors import InputError
from qwen_eqx.generation.buffer import ActivationBuffer
from qwen_eqx.generation.options import Options, Settings
from qwen_eqx.generation.progress import report_now_and_then
from qwen_eqx.generation.prompts import PromptBatch
from qwen_eqx.generation.sample import AbstractSampler, needs_seen
from qwen_eqx.model.cache import KVCache
from qwen_eqx.model.edits import AbstractEdit, EditTap, for_each_row, resolve_edits
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.room import free_device_bytes
from qwen_eqx.model.sites import FINAL_KINDS, Recorder, Site


class GenerationState(eqx.Module):
    """All that one step needs and changes. Columns are a ring: token i of a row is in column (first + i) % new."""

    cache: KVCache
    token: Int[Array, " batch"]  # chosen last, not yet read by the model
    tokens: Int[Array, "batch new"]  # chosen so far; the pad token elsewhere
    log_probs: Float32[Array, "batch new"]  # of the chosen tokens under the model; 0 elsewhere
    buffer: ActivationBuffer | None  # column t: what produced token t; 0 elsewhere
    seen: Bool[Array, "batch vocab"] | None  # tokens of prompt and output; kept only for samplers that ask
    column: Int[Array, ""]  # columns written so far
    first: Int[Array, " batch"]  # the column of each row's token 0
    length: Int[Array, " batch"]  # tokens generated, the stop token included
    limit: Int[Array, " batch"]  # tokens after which a row is done; at most `new`
    done: Bool[Array, " batch"]
    prompt_length: Int[Array, " batch"]
    keys: Key[Array, " batch"]  # folded from (seed, item, sample); each step folds itself in

    @property
    def activations(self) -> Float[Array, "sites batch new d_model"] | None:
        """What the buffer holds."""
        return None if self.buffer is None else self.buffer.values


class PromptState(eqx.Module):
    """Prompts that were read once and can be continued any number of times."""

    cache: KVCache
    logits: Float32[Array, "prompts vocab"]
    last: Float[Array, "sites prompts 1 d_model"] | None  # what produced those logits
    seen: Bool[Array, "prompts vocab"] | None
    lengths: Int[Array, " prompts"]
    activations: Float[Array, "sites prompts prompt d_model"] | None  # of the whole prompts; 0 at pads


class _Reading(NamedTuple):
    """What reading prompts, chunk by chunk, has come to."""

    cache: KVCache
    x: Float[Array, "prompts d_model"]  # the residual stream at the last position
    last: Float[Array, "sites prompts 1 d_model"] | None  # captured there
    kept: Float[Array, "sites prompts prompt d_model"] | None  # captured everywhere; None unless prompts are kept


class Generator(eqx.Module):
    """Sampler, edits and settings: with a model, everything needed to prefill, step and loop."""

    sampler: AbstractSampler
    edits: tuple[AbstractEdit, ...]
    settings: Settings = eqx.field(static=True)

    @classmethod
    def init(cls, model: Qwen, options: Options, *, prompts: int, width: int, samples: int = 1) -> "Generator":
        """The options, checked against the model and against the memory that so many prompts of this width need."""
        settings = options.settings(model, width)
        plan = settings.memory_plan(model.config, prompts=prompts, width=width, samples=samples)
        plan.check_fits(free_device_bytes(settings.mesh and settings.mesh.local_devices))
        edits = resolve_edits(options.edits, model.config, rows=prompts)
        for number, edit in enumerate(edits):
            if isinstance(edit.site, Site) and edit.site.kind in FINAL_KINDS:
                raise InputError(
                    f"edits[{number}]: found site '{edit.site}', expected another; model.run_with_capture edits it"
                )
        return cls(*sharding.place_whole((options.sampler, edits), settings.mesh), settings)

    def prefill(
        self, model: Qwen, batch: PromptBatch
    ) -> tuple[GenerationState, Float[Array, "sites prompts prompt d_model"] | None]:
        """Reads the prompts once and chooses the first token of every row; what was captured at the prompts comes along."""
        prompt = self.read(model, batch.tokens, batch.lengths)
        return self.begin(model, prompt, batch.keys), prompt.activations

    def read(self, model: Qwen, tokens: Int[Array, "prompts prompt"], lengths: Int[Array, " prompts"]) -> PromptState:
        """Reads left-padded prompts."""
        end = self._read(model, tokens, lengths)
        seen = None
        if needs_seen(self.sampler):
            mark = functools.partial(_mark, vocab=model.config.vocab)
            seen = sharding.whole_rows(mark, self.settings.mesh, tokens, lengths)
        return PromptState(end.cache, model.logits(end.x), end.last, seen, lengths, end.kept)

    def begin(self, model: Qwen, prompt: PromptState, keys: Key[Array, " batch"]) -> GenerationState:
        """Chooses the first token of each row; several rows may share a prompt."""
        copies = keys.shape[0] // prompt.lengths.shape[0]
        cache, logits, last, seen, lengths = prompt.cache, prompt.logits, prompt.last, prompt.seen, prompt.lengths
        if copies > 1:
            cache, seen, logits, lengths = _repeat((cache, seen, logits, lengths), copies, axis=0)
            last = _repeat(last, copies, axis=1)
        state = self.empty(model, cache, lengths, keys, seen)
        state = eqx.tree_at(lambda s: s.done, state, jnp.zeros_like(state.done))
        return self.choose(state, logits, last)

    def empty(
        self,
        model: Qwen,
        cache: KVCache,
        prompt_length: Int[Array, " batch"],
        keys: Key[Array, " batch"],
        seen: Bool[Array, "batch vocab"] | None,
    ) -> GenerationState:
        """A state in which nothing was generated and every row is done."""
        new, batch, buffer = self.settings.new, keys.shape[0], None
        if self.settings.keep_generated:
            buffer = ActivationBuffer.init(
                sites=len(self.settings.sites),
                batch=batch,
                new=new,
                d_model=model.config.d_model,
                dtype=self.settings.capture_dtype,
                platform=self.settings.platform,
            )
        state = GenerationState(
            cache=cache,
            token=jnp.zeros(batch, jnp.int32),
            tokens=jnp.full((batch, new), self.settings.pad_token, jnp.int32),
            log_probs=jnp.zeros((batch, new), jnp.float32),
            buffer=buffer,
            seen=seen,
            column=jnp.zeros((), jnp.int32),
            first=jnp.zeros(batch, jnp.int32),
            length=jnp.zeros(batch, jnp.int32),
            limit=jnp.full(batch, new, jnp.int32),
            done=jnp.ones(batch, bool),
            prompt_length=prompt_length,
            keys=keys,
        )
        return self.dealt(state)

    def step(self, model: Qwen, state: GenerationState) -> GenerationState:
        """Reads each row's last token and chooses its next one; rows that are done keep what they have."""
        x, cache, values = self._forward(model, state.token[:, None], state.cache, state.prompt_length)
        state = eqx.tree_at(lambda s: s.cache, state, cache)
        return self.choose(state, model.logits(x[:, 0]), values if self.settings.keep_generated else None)

    def loop(
        self, model: Qwen, state: GenerationState, watcher: Int[Array, ""] | None = None, watched: int | None = None
    ) -> GenerationState:
        """Steps until every row is done, looking every `stride` steps; a watcher hears of the first rows now and then."""

        def step(_: Int[Array, ""], state: GenerationState) -> GenerationState:
            state = self.step(model, state)
            if watcher is not None:
                report_now_and_then(watcher, state.column, state.length[:watched], state.done[:watched])
            return state

        def steps(state: GenerationState) -> GenerationState:
            return jax.lax.fori_loop(0, self.settings.stride, step, state)

        return jax.lax.while_loop(lambda s: ~s.done.all(), steps, state)

    def choose(
        self,
        state: GenerationState,
        logits: Float32[Array, "batch vocab"],
        produced_by: Float[Array, "sites batch 1 d_model"] | None,
    ) -> GenerationState:
        """Chooses a token per row and writes it, its log-probability and its activations into the next column."""
        live = ~state.done
        mesh = self.settings.mesh
        # said twice, split and then whole: or else the weights of the head are gathered, and not the logits
        logits = sharding.keep_rows(logits, mesh, split=logits.shape[1])
        drawn_by = (state.keys, state.column - state.first, state.seen)
        token, log_prob, seen = sharding.whole_rows(self._chosen, mesh, logits, *drawn_by)
        at = state.column % self.settings.new
        tokens = _write_column(state.tokens, token, live, at)
        buffer = state.buffer
        if buffer is not None and produced_by is not None:
            buffer = buffer.write(produced_by, live, at)
        length = state.length + live.astype(jnp.int32)
        state = GenerationState(
            cache=state.cache,
            token=jnp.where(live, token, state.token),
            tokens=tokens,
            log_probs=_write_column(state.log_probs, log_prob, live, at),
            buffer=buffer,
            seen=seen,
            column=state.column + 1,
            first=state.first,
            length=length,
            limit=state.limit,
            done=state.done | (length >= state.limit) | self._stops(tokens, token, length, state.column),
            prompt_length=state.prompt_length,
            keys=state.keys,
        )
        return self.dealt(state)

    def _chosen(
        self,
        logits: Float32[Array, "batch vocab"],
        keys: Key[Array, " batch"],
        number: Int[Array, " batch"],
        seen: Bool[Array, "batch vocab"] | None,
    ) -> tuple[Int[Array, " batch"], Float32[Array, " batch"], Bool[Array, "batch vocab"] | None]:
        """Each row's token, its log-probability, and the tokens seen with it."""
        token = self.sampler(logits, jax.vmap(jax.random.fold_in)(keys, number), seen)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        if seen is not None:
            seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
        return token, chosen - jax.nn.logsumexp(logits, axis=-1), seen

    def dealt(self, state: GenerationState) -> GenerationState:
        """The state, on a mesh with its rows over data and the cache's heads over model, wherever it was made."""
        mesh, heads = self.settings.mesh, state.cache.layers[0].keys.shape[1]
        if mesh is None:
            return state
        kept = {name: sharding.keep_rows(field, mesh) for name, field in vars(state).items()}
        kept["cache"] = sharding.keep_rows(state.cache, mesh, split=heads)
        if state.buffer is not None:
            kept["buffer"] = sharding.keep_rows(state.buffer, mesh, axis=state.buffer.rows_axis)
        return GenerationState(**kept)

    def _stops(
        self,
        tokens: Int[Array, "batch new"],
        token: Int[Array, " batch"],
        length: Int[Array, " batch"],
        column: Int[Array, ""],
    ) -> Bool[Array, " batch"]:
        stops = jnp.zeros(token.shape, bool)
        for stop in self.settings.stop_tokens:
            stops |= token == stop
        for sequence in self.settings.stop_sequences:
            columns = (column - jnp.arange(len(sequence) - 1, -1, -1)) % self.settings.new
            same = (tokens[:, columns] == jnp.asarray(sequence, jnp.int32)[None, :]).all(-1)
            stops |= same & (length >= len(sequence))  # a stop never matches the prompt
        return stops

    def _forward(
        self,
        model: Qwen,
        tokens: Int[Array, "rows seq"],
        cache: KVCache,
        prompt_length: Int[Array, " rows"],
        *,
        fresh: bool = False,
    ) -> tuple[Float[Array, "rows seq d_model"], KVCache, Float[Array, "sites rows kept d_model"] | None]:
        """A forward pass with edits and capture; `fresh`: the cache is still empty, so the tokens see only one another."""
        mesh, read = self.settings.mesh, functools.partial(self._forward_rows, fresh=fresh)
        rows = {"tokens": tokens, "cache": cache, "prompt_length": prompt_length}
        if not sharding.deals(tokens.shape[0], mesh):
            return read(self.edits, model, **rows)
        edits, by_row = for_each_row(self.edits, tokens.shape[0])
        arrays, static = eqx.partition(edits, eqx.is_array)
        given = {name: (value, sharding.specs(value)) for name, value in rows.items()}
        given |= {"arrays": (arrays, sharding.specs(arrays, by_row)), "model": (model, sharding.specs(model, []))}
        made = sharding.ROWS, given["cache"][1], sharding.SITES_ROWS
        return sharding.by_rows(lambda arrays, **rest: read(eqx.combine(arrays, static), **rest), mesh, given, made)

    def _forward_rows(
        self,
        edits: tuple[AbstractEdit, ...],
        model: Qwen,
        tokens: Int[Array, "rows seq"],
        cache: KVCache,
        prompt_length: Int[Array, " rows"],
        *,
        fresh: bool,
    ) -> tuple[Float[Array, "rows seq d_model"], KVCache, Float[Array, "sites rows kept d_model"] | None]:
        edit = EditTap(edits, cache.positions(tokens.shape[1]), prompt_length, model.config)
        recorder = Recorder(self.settings.sites, edit)
        x, cache = model.forward(tokens, cache.length, None if fresh else cache, recorder)
        if not self.settings.sites:
            return x, cache, None
        wanted = slice(0 if self.settings.keep_prompt else -1, None)  # the last position is what a token is chosen from
        values = jnp.stack([recorder.values[site][:, wanted] for site in self.settings.sites])
        return x, cache, values.astype(self.settings.capture_dtype)

    def _read(self, model: Qwen, tokens: Int[Array, "prompts prompt"], lengths: Int[Array, " prompts"]) -> _Reading:
        prompts, width = tokens.shape
        empty = KVCache.init(model.config, batch=prompts, kv_seq=self.settings.kv_seq, dtype=self.settings.cache_dtype)
        empty = eqx.tree_at(lambda c: c.length, empty, lengths - width)  # the pads come first
        if width <= self.settings.prefill_chunk:
            x, cache, kept = self._forward(model, tokens, empty, lengths, fresh=True)
            last = None if kept is None else kept[:, :, -1:]
            return _Reading(cache.grown(empty), x[:, -1], last, self._without_pads(kept, lengths))
        chunk = self.settings.prefill_chunk
        kept = None
        if self.settings.keep_prompt:
            kept = jnp.zeros(
                (len(self.settings.sites), prompts, width, model.config.d_model), self.settings.capture_dtype
            )

        def read(i: Int[Array, ""], before: _Reading) -> _Reading:
            part = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
            x, cache, values = self._forward(model, part, before.cache, lengths)
            kept = before.kept
            if kept is not None and values is not None:
                kept = jax.lax.dynamic_update_slice_in_dim(kept, values, i * chunk, axis=2)
            return _Reading(cache, x[:, -1], None if values is None else values[:, :, -1:], kept)

        x = jnp.zeros((prompts, model.config.d_model), model.dtype)
        last = None
        if self.settings.sites:
            last = jnp.zeros((len(self.settings.sites), prompts, 1, model.config.d_model), self.settings.capture_dtype)
        end = jax.lax.fori_loop(0, width // chunk, read, _Reading(empty, x, last, kept))
        return end._replace(kept=self._without_pads(end.kept, lengths))

    def _without_pads(
        self, kept: Float[Array, "sites prompts prompt d_model"] | None, lengths: Int[Array, " prompts"]
    ) -> Float[Array, "sites prompts prompt d_model"] | None:
        if kept is None or not self.settings.keep_prompt:
            return None
        real = jnp.arange(kept.shape[2])[None, :] >= kept.shape[2] - lengths[:, None]
        return jnp.where(real[None, :, :, None], kept, jnp.zeros((), kept.dtype))


def _write_column(
    rows: Float32[Array, "batch new"] | Int[Array, "batch new"],
    value: Float32[Array, " batch"] | Int[Array, " batch"],
    live: Bool[Array, " batch"],
    at: Int[Array, ""],
) -> Float32[Array, "batch new"] | Int[Array, "batch new"]:
    """Puts `value` in column `at` of the rows that are live: one slice update for the batch."""
    old = jax.lax.dynamic_slice_in_dim(rows, at, 1, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(rows, jnp.where(live[:, None], value[:, None], old), at, axis=1)


def _repeat(tree, copies: int, *, axis: int):
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=axis) if leaf.ndim else leaf, tree)


def _mark(tokens: Int[Array, "rows seq"], lengths: Int[Array, " rows"], vocab: int) -> Bool[Array, "rows {vocab}"]:
    """Which tokens stand in each left-padded row."""
    rows, seq = tokens.shape
    real = jnp.arange(seq)[None, :] >= seq - lengths[:, None]
    marks = jnp.zeros((rows, vocab), bool)
    return marks.at[jnp.arange(rows)[:, None], jnp.where(real, tokens, vocab)].set(True, mode="drop")
