"""What a model computes on a mesh is what it computes on one device, through the collectives that it takes and no others."""

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_eqx
import scaling
import strategies
import tiny
from qwen_eqx import Qwen, QwenConfig, sharding
from qwen_eqx.generation import scheduler, seats
from tolerances import SAME_F32

CONFIG = QwenConfig("qwen2", 96, 16, 1, 4, 2, 6, 24, 64, rope_theta=10_000.0)
PROMPTS = [[1, 2, 3], [4, 5], [7], [8, 9, 10, 11], [1, 1], [2]]
SITES = ["blocks.0.attn.hook_q", "blocks.0.mlp.hook_post", "blocks.0.hook_resid_post"]
# of 1, 2, 4 and 8 devices; rows alone, weights alone, both; model=4 divides heads, d_ff and vocab, but not kv_heads
MESHES = ["data=1", "data=1,model=2", "data=4", "data=2,model=4"]


@cache
def model(spec: str | None = None, layers: int = 1) -> Qwen:
    made = tiny.random_model(QwenConfig(**{**vars(CONFIG), "layers": layers}))
    return made if spec is None else sharding.shard(made, qwen_eqx.make_mesh(spec))


def own(shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def topped(x: jax.Array) -> jax.Array:
    """Something like a TopK dictionary."""
    return jnp.where(x >= jax.lax.top_k(x, 12)[0][..., -1:], x, 0.0)


# six rows, each steered its own way, one position of all patched
EDITS = [
    qwen_eqx.Steer(own((6, 16)), site="blocks.0.hook_resid_mid"),
    qwen_eqx.Patch(own((1, 16)), np.zeros(1, np.int32), site="blocks.0.hook_resid_pre"),
    qwen_eqx.Replace(topped, site="blocks.0.hook_mlp_out"),
]
SAMPLER = qwen_eqx.Chain(qwen_eqx.RepetitionPenalty(1.3), qwen_eqx.TopK(5), qwen_eqx.Temperature(1.0))


def generated(model: Qwen) -> list[Any]:
    capture = qwen_eqx.Capture(layers=[0], positions="all")
    how: dict[str, Any] = {"sampler": SAMPLER, "capture": capture, "edits": EDITS, "stop_tokens": [5], "samples": 2}
    out = qwen_eqx.generate(model, PROMPTS, max_new_tokens=4, **how)
    return [out.tokens, out.lengths, out.log_probs, out.activations, out.prompt_activations]


def scheduled(model: Qwen) -> list[Any]:
    how: dict[str, Any] = {"sampler": qwen_eqx.Temperature(1.0), "capture": qwen_eqx.Capture(layers=[0])}
    done = qwen_eqx.schedule(model, PROMPTS, max_new_tokens=4, slots=3, stop_tokens=[5], order="arrival", **how)
    parts = [(one.tokens, one.log_probs, one.activations) for one in done]
    return [part if acts is None else acts[:, : len(part)] for *two, acts in parts for part in (*two, two[0])]


def scored(model: Qwen) -> list[Any]:
    return qwen_eqx.score(model, [1, 2, 3], [[1, 2, 3], [4, 5], [6]], batch_size=3)


def beamed(model: Qwen) -> list[Any]:
    found = qwen_eqx.beam_search(model, [1, 2, 3], beams=3, max_new_tokens=3, stop_tokens=[5])
    return [*found.tokens, found.log_probs]


def listed(model: Qwen) -> list[Any]:
    found = qwen_eqx.threshold_search(model, [1, 2, 3], p=0.05, max_new_tokens=2, stop_tokens=[5])
    return [*found.tokens, found.log_probs]


def captured(model: Qwen) -> list[Any]:
    logits, acts = model.run_with_capture(PROMPTS, SITES, edits=EDITS, logits="last")
    return [logits, *(acts[site] for site in SITES)]


@cache
def on_one_device(call: Callable[[Qwen], list[Any]]) -> list[Any]:
    return call(model())


def same(found: list[Any], expected: list[Any]) -> None:
    """Whole numbers exactly, floats but for the order of sums."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=SAME_F32["rtol"], atol=SAME_F32["atol"])
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("call", [generated, captured])
def test_a_mesh_changes_no_result(call: Callable[[Qwen], list[Any]], spec: str):
    same(call(model(spec)), on_one_device(call))


@pytest.mark.parametrize("spec", ["data=1", "data=2", "data=2,model=2", "data=4,model=2"])
@pytest.mark.parametrize("call", [scheduled, scored, beamed])
def test_nor_does_it_change_what_is_built_of_generation(call: Callable[[Qwen], list[Any]], spec: str):
    same(call(model(spec)), on_one_device(call))


def test_an_exact_search_finds_the_same():
    same(listed(model("data=1,model=2")), on_one_device(listed))


@settings(max_examples=5)
@given(st.data(), st.sampled_from(["data=2", "data=4,model=2", "data=3"]), st.integers(1, 5))
def test_batches_of_any_size(data: st.DataObject, spec: str, rows: int):
    """The axis need not divide them: copies fill them up, and nobody sees these."""
    prompts = data.draw(strategies.prompts(96, 5))
    how: dict[str, Any] = {"max_new_tokens": 3, "sampler": qwen_eqx.Temperature(1.0), "stop_tokens": [5]}
    found = qwen_eqx.generate(model(spec), prompts[:rows], **how)
    expected = qwen_eqx.generate(model(), prompts, **how)
    same([found.tokens, found.log_probs], [expected.tokens[:rows], expected.log_probs[:rows]])


# seven slots, of which eight are made on four groups of devices
SEVEN: dict[str, Any] = {
    "max_new_tokens": 4,
    "max_prompt_tokens": 5,
    "stop_tokens": [5],
    "slots": 7,
    "order": "arrival",
}


@settings(max_examples=5)
@given(st.lists(st.lists(st.integers(1, 95), min_size=1, max_size=5), min_size=1, max_size=9), st.sampled_from([1, 2]))
def test_a_schedule_of_any_length(prompts: list[list[int]], samples: int):
    """Neither prompts nor slots need be a multiple of the axis; each group of devices reads the prompts of its slots."""
    found = list(qwen_eqx.schedule(model("data=4"), prompts, samples=samples, **SEVEN))
    expected = list(qwen_eqx.schedule(model(), prompts, samples=samples, **SEVEN))
    for one, other in zip(found, expected, strict=True):
        same([*one[:4], *one[4:6]], [*other[:4], *other[4:6]])


def test_each_group_of_devices_reads_the_prompts_of_its_own_slots(monkeypatch: pytest.MonkeyPatch):
    calls, read = list[tuple[int, ...]](), scheduler._read

    def counted(model: Qwen, generator: Any, tokens: Any, lengths: Any) -> Any:
        calls.append(tuple(np.asarray(lengths).tolist()))
        return read(model, generator, tokens, lengths)

    monkeypatch.setattr(scheduler, "_read", counted)
    assert len(list(qwen_eqx.schedule(model("data=4"), PROMPTS, **SEVEN))) == 6
    assert calls == [(3, 2, 1, 4), (2, 1, 1, 1)]  # two groups have no prompt of their own left, and read the last along
    calls.clear()
    assert len(list(qwen_eqx.schedule(model("data=4"), PROMPTS[:3], samples=4, **SEVEN))) == 12
    assert calls == [(3,) * 4, (2,) * 4, (1,) * 4]  # samples share what was read


def test_a_device_makes_of_its_rows_bit_for_bit_what_one_alone_makes_of_them():
    prompts, how = [*PROMPTS, [3], [9, 9]], {"max_new_tokens": 4, "capture": qwen_eqx.Capture(layers=[0])}
    whole = qwen_eqx.generate(model("data=4"), prompts, **how)
    assert whole.activations is not None
    for at in range(0, 8, 2):
        alone = qwen_eqx.generate(model(), prompts[at : at + 2], items=[at, at + 1], **how)
        np.testing.assert_array_equal(whole.tokens[at : at + 2], alone.tokens)
        np.testing.assert_array_equal(whole.log_probs[at : at + 2], alone.log_probs)
        np.testing.assert_array_equal(whole.activations[:, at : at + 2], alone.activations)


def test_a_buffer_in_the_order_of_a_tpu_holds_the_same(monkeypatch: pytest.MonkeyPatch):
    """There columns stand before rows; nobody sees it."""
    how: dict[str, Any] = {"max_new_tokens": 4, "capture": qwen_eqx.Capture(layers=[0]), "stop_tokens": [5]}
    found = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(sharding, "platform", lambda model, platform=platform: platform)
        out = qwen_eqx.generate(model("data=2"), PROMPTS[:3], **how)
        done = qwen_eqx.schedule(model("data=2"), PROMPTS[:3], slots=2, order="arrival", **how)
        rows = [np.asarray(one.activations)[:, : one.length] for one in done if one.activations is not None]
        found.append([out.activations, out.tokens, *rows])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_progress_is_that_of_the_rows_that_were_asked_for():
    heard: list[qwen_eqx.Progress] = []
    out = qwen_eqx.generate(model("data=4"), PROMPTS[:3], max_new_tokens=4, progress=heard.append)
    assert (heard[-1].tokens, heard[-1].rows_done, heard[-1].rows) == (int(out.lengths.sum()), 3, 3)


def test_a_capture_stays_where_it_was_computed():
    out = qwen_eqx.generate(model("data=4"), [*PROMPTS, [3], [9, 9]], max_new_tokens=4, capture=qwen_eqx.Capture([0]))
    assert out.activations is not None
    assert [part.data.shape for part in out.activations.addressable_shards] == [(1, 2, 4, 16)] * 4
    done = qwen_eqx.schedule(model("data=4"), PROMPTS, max_new_tokens=4, slots=4, capture=qwen_eqx.Capture([0]))
    assert len({one.activations.device for one in done if one.activations is not None}) > 1


# ---------------------------------------------------------------- compiled programs

COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


def slots(spec: str) -> tuple[Qwen, Any, Any]:
    """A model, what generates with it, and the state of eight slots."""
    many = model(spec, layers=2)
    capture = qwen_eqx.Capture(layers=[0, 1], positions="all")
    options = scheduler.ScheduleOptions(max_new_tokens=4, slots=8, sampler=SAMPLER, edits=EDITS[2:], capture=capture)
    generator = scheduler.Generator.init(many, options, prompts=8, width=8)
    return many, generator, scheduler._vacant(many, generator, 8)


def stepping(spec: str) -> tuple[Any, Any]:
    """The compiled loop of the scheduler, and the state it is given."""
    many, generator, state = slots(spec)
    run: Any = scheduler._run
    return run.lower(scheduler._Program(many, generator), state).compile().compiled, state


@pytest.mark.parametrize("spec", ["data=4", "data=2,model=2", "data=2,model=4", "data=1,model=8"])
def test_decoding_takes_the_collectives_that_are_foretold_and_updates_its_state_in_place(spec: str):
    """None in a step where only rows are dealt; model=4 and model=8 divide no key heads."""
    compiled, state = stepping(spec)
    found = COLLECTIVE.findall(compiled.as_text())
    mesh = qwen_eqx.make_mesh(spec)
    foretold = scaling.collectives(model(spec, layers=2).config, mesh, 8 // mesh.shape["data"], itemsize=4)
    exchanged = [(kind, shape) for shape, kind in found if shape != "pred[]"]  # which says whether any row has ended
    sizes = [(kind, re.findall(r"\d+", shape.partition("]")[0].removeprefix("f32["))) for kind, shape in exchanged]
    of_bytes = [(kind, 4 * math.prod(map(int, dimensions))) for kind, dimensions in sizes]
    assert Counter(of_bytes) == Counter((each.kind, each.bytes) for each in foretold)
    assert len(found) - len(exchanged) == (mesh.shape["data"] > 1)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == held


def test_prompts_are_read_and_enter_their_slots_without_any_exchange():
    many, generator, state = slots("data=4")
    tokens, lengths = sharding.place_rows((jnp.ones((4, 8), jnp.int32), jnp.full(4, 8)), sharding.mesh_of(many))
    read: Any = scheduler._read
    admit: Any = seats.admit
    assert COLLECTIVE.findall(read.lower(many, generator, tokens, lengths).compile().compiled.as_text()) == []
    prompt = read(many, generator, tokens, lengths)
    assert {part.data.shape for part in prompt.cache.layers[0].keys.addressable_shards} == {(1, 2, 12, 6)}
    free = seats.Seats(*(jnp.zeros(4, kind) for kind in (jnp.int32, jnp.int32, bool)))
    free = sharding.place_rows(free, sharding.mesh_of(many))
    keys = sharding.place_rows(state.keys[:4], sharding.mesh_of(many))
    admission = seats.Admission(many, generator, prompt, keys, free)
    compiled = admit.lower(admission, state).compile().compiled
    assert COLLECTIVE.findall(compiled.as_text()) == []
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == held
