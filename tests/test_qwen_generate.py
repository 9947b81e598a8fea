"""The laws of generation: what comes out is what plain passes give, however the work was cut up."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import qwen_eqx
import running
import strategies
import tiny
import tolerances
from qwen_eqx import Capture, Chain, Generation, InputError, MinP, Qwen, Temperature, TopK, TopP
from running import NEW, PROMPTS, assert_same, generate, greedy

PLAIN = Temperature(1.0)


def check_against_plain_passes(model: Qwen, prompts: list[list[int]], out: Generation, choose_greedily: bool = True):
    """Tokens, log-probabilities and every captured activation, from one pass over each final sequence."""
    sites = tiny.d_model_sites(model.config)
    for row, prompt in enumerate(prompts):
        length = int(out.lengths[row])
        tokens = np.asarray(out.tokens[row, :length])
        logits, acts = running.forward(model, [*prompt, *tokens[:-1].tolist()], sites)
        chose = np.arange(len(prompt) - 1, len(prompt) + length - 1)
        kept = np.asarray(out.activations[:, row], np.float32)
        seen = np.asarray(out.prompt_activations[:, row], np.float32)
        width = seen.shape[1]
        log_probs = oracles.log_softmax(logits.astype(np.float64))[chose, tokens]
        if model.dtype == jnp.float32:
            if choose_greedily:
                np.testing.assert_array_equal(tokens, logits[chose].argmax(-1))
            np.testing.assert_allclose(out.log_probs[row, :length], log_probs, **tolerances.SAME_F32)
            np.testing.assert_allclose(kept[:, :length], acts[:, chose], **tolerances.SAME_F32)
            np.testing.assert_allclose(seen[:, width - len(prompt) :], acts[:, : len(prompt)], **tolerances.SAME_F32)
        else:
            for ours, theirs in ((kept[:, :length], acts[:, chose]), (seen[:, -len(prompt) :], acts[:, : len(prompt)])):
                errors = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
                assert errors.max() < tolerances.BF16_ROW
        assert not seen[:, : width - len(prompt)].any()
        assert not kept[:, length:].any()
        assert not np.asarray(out.tokens[row, length:]).any()
        assert not np.asarray(out.log_probs[row, length:]).any()


@pytest.mark.parametrize(("name", "dtype"), [("qwen2", "float32"), ("qwen3", "float32"), ("qwen2", "bfloat16")])
@given(data=st.data())
@settings(max_examples=6)
def test_prefill_and_decode_are_the_plain_forward(name: str, dtype: str, data: st.DataObject):
    model = tiny.model(name, dtype)
    prompts = data.draw(strategies.prompts(model.config.vocab, rows=4))
    out = generate(prompts, model=model)
    assert out.activations.dtype == out.prompt_activations.dtype == model.dtype
    assert np.asarray(out.lengths).tolist() == [NEW] * 4
    check_against_plain_passes(model, prompts, out)


def test_log_probs_are_the_model_s_also_under_a_filter():
    sampler = Chain(Temperature(0.7), TopK(9), TopP(0.9), MinP(0.02))
    out = generate(PROMPTS, sampler=sampler, key=jax.random.key(3))
    check_against_plain_passes(tiny.model(), PROMPTS, out, choose_greedily=False)
    assert not np.array_equal(out.tokens, greedy().tokens)


@given(prompts=strategies.prompts(97, rows=4))
@settings(max_examples=5)
def test_a_batch_is_its_rows(prompts: list[list[int]]):
    together = generate(prompts)
    for row, prompt in enumerate(prompts):
        assert_same(generate([prompt]), together, [row])


def test_another_bucket_changes_nothing():
    longer = [list(range(40, 60)), *PROMPTS[1:]]
    out = generate(longer)
    assert out.prompt_activations.shape[2] == 24 != greedy().prompt_activations.shape[2]
    for row in (1, 2, 3):
        np.testing.assert_array_equal(out.tokens[row], greedy().tokens[row])
        np.testing.assert_allclose(out.log_probs[row], greedy().log_probs[row], **tolerances.SAME_F32)
        np.testing.assert_allclose(out.activations[:, row], greedy().activations[:, row], **tolerances.SAME_F32)


@pytest.mark.parametrize(("pad", "pad_token"), [(-1, None), (96, 96)])
def test_a_padded_array_is_the_list(pad: int, pad_token: int | None):
    array = np.full((4, 19), pad)
    for row, prompt in enumerate(PROMPTS):
        array[row, 19 - len(prompt) :] = prompt
    for form in (array.astype(np.int32), jnp.asarray(array)):
        assert_same(generate(form, pad_token=pad_token), greedy(), exact=True)


def test_capture_changes_nothing_and_keeps_what_is_asked():
    off = qwen_eqx.generate(tiny.model(), PROMPTS, max_new_tokens=NEW)
    assert off.activations is off.prompt_activations is None
    assert_same(off, greedy())
    sites = tiny.d_model_sites(tiny.model().config)
    for positions in ("generated", "prompt"):
        some = generate(PROMPTS, capture=Capture(sites=sites[3:5], positions=positions, dtype=jnp.bfloat16))
        if positions == "generated":
            assert some.prompt_activations is None
            found, expected = some.activations, greedy().activations
        else:
            assert some.activations is None
            found, expected = some.prompt_activations, greedy().prompt_activations
        assert found.dtype == jnp.bfloat16
        near = {"rtol": 2**-8, "atol": 2**-12}  # one rounding to bf16
        np.testing.assert_allclose(found.astype(jnp.float32), np.asarray(expected)[3:5], **near)


@pytest.mark.parametrize("chunk", [5, 8])
def test_a_prompt_read_in_chunks_is_the_prompt_read_whole(chunk: int):
    assert_same(generate(PROMPTS, prefill_chunk=chunk), greedy())


def test_a_cache_in_its_own_dtype():
    out = generate(PROMPTS, cache_dtype=jnp.bfloat16, max_new_tokens=1)  # the first token is read from no cache
    np.testing.assert_array_equal(out.tokens[:, 0], greedy().tokens[:, 0])
    np.testing.assert_allclose(out.log_probs[:, 0], greedy().log_probs[:, 0], **tolerances.SAME_F32)
    assert np.asarray(out.lengths).tolist() == [1] * 4
    wide = tiny.model(dtype="bfloat16")
    assert_same(generate(PROMPTS, model=wide, cache_dtype=jnp.float32), generate(PROMPTS, model=wide))


def test_samples_share_a_prefill_and_are_runs_of_their_own():
    key = jax.random.key(1)
    both = generate(PROMPTS[1:3], sampler=PLAIN, samples=2, key=key)
    assert both.prompt_activations.shape[1] == 2
    assert len({np.asarray(row).tobytes() for row in both.tokens}) == 4
    sampled = np.asarray(both.tokens)
    for sample in range(2):
        generator, batch = qwen_eqx.prepare(tiny.model(), PROMPTS[1:3], max_new_tokens=NEW, sampler=PLAIN)
        batch = dataclasses.replace(batch, keys=row_keys(key, np.arange(2), np.full(2, sample)))
        np.testing.assert_array_equal(by_hand(tiny.model(), generator, batch).tokens, sampled[sample::2])


def row_keys(key, items, samples):
    fold = jax.random.fold_in
    return jax.numpy.stack([fold(fold(key, int(i)), int(s)) for i, s in zip(items, samples, strict=True)])


def by_hand(model, generator, batch):
    """Generation by its public pieces, one step after another."""
    state, _ = running.eqx.filter_jit(generator.prefill)(model, batch)
    step = running.eqx.filter_jit(generator.step)
    while not bool(state.done.all()):
        state = step(model, state)
    return state


def test_stepping_by_hand_is_generate():
    capture = Capture(sites=tiny.d_model_sites(tiny.model().config), positions="all")
    generator, batch = qwen_eqx.prepare(tiny.model(), PROMPTS, max_new_tokens=NEW, capture=capture)
    state = by_hand(tiny.model(), generator, batch)
    assert_same(Generation(state.tokens, state.length, state.log_probs, state.activations, None), greedy())
    assert int(state.column) == NEW


def test_what_is_drawn_for_an_item_depends_on_no_batch_and_no_order():
    key = jax.random.key(7)
    whole = generate(PROMPTS, sampler=PLAIN, key=key, items=[10, 11, 12, 13])
    order = [2, 0, 3, 1]
    shuffled = generate([PROMPTS[i] for i in order], sampler=PLAIN, key=key, items=[10 + i for i in order])
    assert_same(shuffled, whole, order)
    assert_same(generate([PROMPTS[2]], sampler=PLAIN, key=key, items=[12]), whole, [2])
    other = generate(PROMPTS, sampler=PLAIN, key=jax.random.key(8), items=[10, 11, 12, 13])
    assert not np.array_equal(other.tokens, whole.tokens)
    raw = generate(PROMPTS, sampler=PLAIN, key=jax.random.PRNGKey(7), items=[10, 11, 12, 13])
    assert_same(raw, whole, exact=True)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (qwen_eqx.generate, qwen_eqx.GenerateOptions),
        (qwen_eqx.prepare, qwen_eqx.Options),
        (qwen_eqx.schedule, qwen_eqx.ScheduleOptions),
    ],
)
def test_a_call_says_which_keywords_it_takes(call, options: type):
    model, prompts, *keywords = inspect.signature(call).parameters.values()
    assert (model.name, prompts.name) == ("model", "prompts")
    fields = dataclasses.fields(options)
    assert [keyword.name for keyword in keywords] == [field.name for field in fields]
    for keyword, field in zip(keywords, fields, strict=True):
        assert keyword.kind is inspect.Parameter.KEYWORD_ONLY
        missing = field.default is dataclasses.MISSING
        assert keyword.default is (inspect.Parameter.empty if missing else field.default)
    required = {field.name: 1 for field in fields if field.default is dataclasses.MISSING}
    with pytest.raises(TypeError, match="sampeler"):
        call(tiny.model(), PROMPTS, sampeler=PLAIN, **required)
    with pytest.raises(TypeError, match="max_new_tokens"):
        call(tiny.model(), PROMPTS)


def test_top_1_is_greedy():
    assert_same(generate(PROMPTS, sampler=TopK(1), key=jax.random.key(5)), greedy())


def test_top_p_1_is_plain_sampling():
    key = jax.random.key(2)
    plain = generate(PROMPTS, sampler=PLAIN, key=key)
    assert_same(generate(PROMPTS, sampler=TopP(1.0), key=key), plain)
    assert not np.array_equal(plain.tokens, greedy().tokens)


def test_no_prompt_gives_nothing_in_the_right_shapes():
    out = generate([])
    assert (out.tokens.shape, out.lengths.shape, out.log_probs.shape) == ((0, NEW), (0,), (0, NEW))
    assert (out.activations.shape, out.prompt_activations.shape) == ((12, 0, NEW, 16), (12, 0, 16, 16))


def test_a_model_filled_to_its_last_position():
    prompt = list(range(62))  # of 64
    out = qwen_eqx.generate(tiny.model(), [prompt], max_new_tokens=2)
    tokens = np.asarray(out.tokens[0]).tolist()
    logits, _ = running.forward(tiny.model(), [*prompt, tokens[0]], ["blocks.0.hook_resid_pre"], room=64)
    assert tokens == logits[-2:].argmax(-1).tolist()


BAD = {
    "a prompt longer than the model": ([list(range(63))], {"max_new_tokens": 2}, ["prompts[0]", "63", "62", "64"]),
    "a long prompt among short ones": ([[1], [2] * 64], {}, ["prompts[1]", "64"]),
    "an empty prompt": ([[1], []], {}, ["prompts[1]", "no token"]),
    "an id beyond the vocabulary": ([[1, 97]], {}, ["prompts[0]", "97"]),
    "a negative id": ([[1, -1]], {}, ["prompts[0]", "-1"]),
    "no new token": ([[1]], {"max_new_tokens": 0}, ["max_new_tokens", "0"]),
    "true new tokens": ([[1]], {"max_new_tokens": True}, ["max_new_tokens", "True"]),
    "no sample": ([[1]], {"samples": 0}, ["samples", "0"]),
    "no chunk": ([[1]], {"prefill_chunk": -1}, ["prefill_chunk", "-1"]),
    "a stop token beyond the vocabulary": ([[1]], {"stop_tokens": (3, 97)}, ["stop_tokens", "97"]),
    "a stop sequence beyond the vocabulary": ([[1]], {"stop_sequences": ((3, 400),)}, ["stop_sequences", "400"]),
    "an empty stop sequence": ([[1]], {"stop_sequences": ((1,), ())}, ["stop_sequences", "empty"]),
    "a pad beyond the vocabulary": ([[1]], {"pad_token": 97}, ["pad_token", "97"]),
    "too few items": ([[1], [2]], {"items": [0]}, ["items", "1", "2"]),
    "a negative item": ([[1]], {"items": [-1]}, ["items", "-1"]),
    "an item beyond 32 bits": ([[1]], {"items": [2**32]}, ["items", "4294967296"]),
    "an unknown site": ([[1]], {"capture": Capture(layers=[2])}, ["blocks.2.hook_resid_post", "blocks.1"]),
    "a site of another width": ([[1]], {"capture": Capture(sites=["blocks.0.attn.hook_q"])}, ["24 wide"]),
    "an edit of another width": (
        [[1]],
        {"edits": [qwen_eqx.Steer(jnp.ones(5), site="model.layers.0")]},
        ["Steer.direction", "5", "16"],
    ),
    "an edit at an unknown site": (
        [[1]],
        {"edits": [qwen_eqx.Ablate(site="model.layers.9")]},
        ["model.layers.9", "does not exist"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_in_one_line_before_anything_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch):
    prompts, options, parts = BAD[name]
    monkeypatch.setattr(Qwen, "forward", lambda *_: pytest.fail("a forward pass was traced"))
    with pytest.raises(InputError) as caught:
        qwen_eqx.generate(tiny.model(), prompts, **({"max_new_tokens": 3} | options))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
