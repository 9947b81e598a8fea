"""Stopping, compilations and memory of the compiled loop."""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_eqx
import running
import tiny
from qwen_eqx import Capture, Generation, Greedy, InputError
from qwen_eqx.generation import engine
from qwen_eqx.weights.hf import skeleton
from running import NEW, PROMPTS, assert_same, greedy

SITES = tiny.d_model_sites(tiny.CONFIGS["qwen2"])
PAD = 3


def stopped(whole: Generation, stops: Sequence[int], sequences: Sequence[Sequence[int]], pad: int) -> Generation:
    """What a run that never stopped becomes when each row is cut after its first stop."""
    tokens, log_probs, acts = (np.array(part) for part in (whole.tokens, whole.log_probs, whole.activations))
    lengths = np.array(whole.lengths)
    for row, said in enumerate(tokens.tolist()):
        for length in range(1, len(said) + 1):
            ends = any(said[max(0, length - len(s)) : length] == list(s) for s in sequences)
            if said[length - 1] in stops or ends:
                lengths[row] = length
                break
        tokens[row, lengths[row] :] = pad
        log_probs[row, lengths[row] :] = 0
        acts[:, row, lengths[row] :] = 0
    return Generation(*map(jnp.asarray, (tokens, lengths, log_probs, acts)), None)


def said(row: int, *columns: int) -> list[int]:
    return [int(greedy().tokens[row, column]) for column in columns]


def unsaid() -> int:
    return next(token for token in range(97) if not (np.asarray(greedy().tokens) == token).any())


STOPS = {  # stop tokens, stop sequences
    "never": lambda: ([unsaid()], []),
    "one token": lambda: (said(0, 2), []),
    "several tokens": lambda: ([*said(1, 1), *said(2, 3), unsaid()], []),
    "all at the first token": lambda: ([*said(0, 0), *said(1, 0), *said(2, 0), *said(3, 0)], []),
    "at the last token": lambda: (said(3, NEW - 1), []),
    "sequences that span steps": lambda: ([], [said(0, 1, 2, 3), said(1, 0, 1), [unsaid(), unsaid()]]),
    "a sequence begun in the prompt": lambda: ([], [[PROMPTS[2][-1], *said(2, 0)], [PROMPTS[0][-1], *said(0, 0)]]),
    "a sequence longer than the output": lambda: ([], [said(0, 0, 1, 2, 3, 4, 5) + said(0, 0)]),
    "tokens and sequences": lambda: (said(2, 4), [said(2, 1, 2), said(3, 2)]),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_row_ends_at_its_stop_and_nothing_leaks_after_it(name: str):
    stops, sequences = STOPS[name]()
    out = running.generate(
        PROMPTS, stop_tokens=stops, stop_sequences=sequences, pad_token=PAD, capture=Capture(sites=SITES)
    )
    expected = stopped(greedy(), stops, sequences, PAD)
    assert_same(out, expected)
    if name in ("never", "a sequence begun in the prompt", "a sequence longer than the output"):
        assert np.asarray(out.lengths).tolist() == [NEW] * 4
    else:
        assert int(jnp.min(out.lengths)) < NEW or name == "at the last token"


def test_more_steps_than_one_stride():
    """The device looks whether all rows are done every few dozen steps only."""
    out = qwen_eqx.generate(tiny.model(), PROMPTS[:2], max_new_tokens=40)
    for row in range(2):
        sequence = [*PROMPTS[row], *np.asarray(out.tokens[row, :-1]).tolist()]
        logits, _ = running.forward(tiny.model(), sequence, ["blocks.0.hook_resid_pre"], room=64)
        np.testing.assert_array_equal(out.tokens[row], logits[len(PROMPTS[row]) - 1 :].argmax(-1))
    stop = int(out.tokens[0, 20])
    first = np.asarray(out.tokens[0]).tolist().index(stop) + 1
    ended = qwen_eqx.generate(tiny.model(), PROMPTS[:2], max_new_tokens=40, stop_tokens=[stop])
    assert int(ended.lengths[0]) == first
    np.testing.assert_array_equal(ended.tokens[0, :first], out.tokens[0, :first])
    assert not np.asarray(ended.tokens[0, first:]).any()


class Counting(Greedy):
    """Greedy, counting how often it is traced."""

    traces = 0

    def __call__(self, logits, keys, seen):
        type(self).traces += 1
        return super().__call__(logits, keys, seen)


def traces_of(prompts: list[list[int]], **options) -> int:
    before = Counting.traces
    qwen_eqx.generate(tiny.model(), prompts, max_new_tokens=3, sampler=Counting(), **options)
    return Counting.traces - before


def test_one_trace_per_bucket_whatever_the_prompts_keys_and_directions():
    def steer(seed: int, scale: float):
        direction = jax.random.normal(jax.random.key(seed), (16,))
        return [qwen_eqx.Steer(direction, scale, site="model.layers.0")]

    assert traces_of([[1], [2, 3]], edits=steer(0, 1.0)) > 0
    assert traces_of([[4, 5, 6], [7] * 16], edits=steer(1, 2.0), key=jax.random.key(9)) == 0
    assert traces_of([[1] * 17, [2]], edits=steer(2, 0.5)) > 0
    assert traces_of([[1] * 24, [2] * 9], edits=steer(3, -1.0)) == 0
    assert traces_of([[1], [2, 3]], edits=steer(4, 0.0)) == 0


@pytest.mark.parametrize(("samples", "positions"), [(1, "all"), (2, "generated"), (2, "prompt")])
def test_the_memory_plan_is_what_is_allocated(samples: int, positions: str):
    model = tiny.model()
    capture = Capture(sites=SITES[:3], positions=positions, dtype=jnp.bfloat16)
    generator, batch = qwen_eqx.prepare(model, PROMPTS[:2], max_new_tokens=5, samples=samples, capture=capture)
    state, kept = jax.eval_shape(lambda batch: generator.prefill(model, batch), batch)

    def size(tree) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    width = batch.tokens.shape[1]
    plan = generator.settings.memory_plan(model.config, prompts=2, width=width, samples=samples)
    assert plan.cache_bytes == size(state.cache.layers) > 0
    assert plan.capture_bytes == size((state.buffer, kept)) > 0
    assert plan.total_bytes == plan.cache_bytes + plan.capture_bytes


def test_what_does_not_fit_says_what_to_lower(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "free_device_bytes", lambda devices=None: 10_000)
    with pytest.raises(InputError, match="max_new_tokens or the number of rows") as caught:
        qwen_eqx.generate(tiny.model(), PROMPTS, max_new_tokens=NEW)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the captured sites or positions"):
        running.generate(PROMPTS)
    monkeypatch.setattr(engine, "free_device_bytes", lambda devices=None: None)  # a platform that does not say
    assert qwen_eqx.prepare(tiny.model(), PROMPTS, max_new_tokens=NEW)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_updates_cache_and_buffer_in_place(dtype: str):
    """By the compiler's account: with the state donated, all of it comes back where it was, and no second copy is made."""
    config = dataclasses.replace(tiny.CONFIGS["qwen2"], layers=8, max_seq=4096)
    model = skeleton(config, jnp.dtype(dtype))
    options = {"max_new_tokens": 3000, "capture": Capture(layers=range(8))}
    generator, batch = qwen_eqx.prepare(model, PROMPTS[:3], **options)
    arrays, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    state, _ = jax.eval_shape(lambda a, b: generator.prefill(eqx.combine(a, static), b), arrays, batch)
    loop = jax.jit(lambda a, s: generator.loop(eqx.combine(a, static), s), donate_argnums=1)
    memory = loop.lower(arrays, state).compile().memory_analysis()
    assert memory is not None
    plan = generator.settings.memory_plan(config, prompts=3, width=batch.tokens.shape[1]).total_bytes
    assert memory.output_size_in_bytes > plan
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 0.1 * plan  # attention's scores; one more copy of cache or buffer would be half
