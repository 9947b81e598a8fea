"""What is printed in a notebook fits on a line or two, whatever it holds."""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arc
import qwen_eqx
import running
import sae
import tiny
from arc.score import Report, Row
from qwen_eqx import PRESETS, Qwen, Tokenizer
from qwen_eqx.weights.hub import EMBEDDED
from sae import training

MANIFEST = sae.Manifest(
    "a-model", "main", "sha256:0", "sha256:1", tuple(f"blocks.{layer}.hook_resid_post" for layer in range(24)), "bfloat16",
    64, 0, sae.Plan(items=1200, items_per_shard=100), {"flag": "x" * 5000}, {"jax": "0.10.2"},
)  # fmt: skip
GRID = arc.as_grid(np.full((30, 30), 3))
TASK = arc.Task("007bbfb7", (arc.Pair(GRID, GRID),) * 3, (arc.Pair(GRID[:5], None),))
TOLD = training.TrainConfig(steps=4, average_decay=0.9)


def dictionary(form: str, **sizes: int) -> sae.AbstractDictionary:
    more = {"k": 4} if "k" in sae.FORMS[form].details else {}
    return sae.FORMS[form].init(d_model=8, d_sae=32, key=jax.random.key(0), **more, **sizes)


def state(form: str = "topk") -> training.TrainState:
    return training.init(dictionary(form), TOLD, jnp.ones((4, 8)))


def donated() -> training.TrainState:
    before = state()
    training.run(before, jnp.ones((2, 16, 8)), TOLD)
    return before


def rows(count: int) -> sae.Rows:
    return sae.Rows.of_sequence([1, 2], np.arange(count), 0, np.ones((3, count, 8), np.float32))


def report() -> Report:
    row = Row("007bbfb7", 1.0, 4, 4, 4, 4, {})
    return Report(0.25, 0.2, {1: 0.1}, 1.0, 1.0, (row,) * 400)


def sample() -> arc.Sample:
    (request,) = arc.ask.requests(TASK)
    return arc.ask.read(request, "3 3")


SHOWN: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "model": (tiny.model, ["qwen2", "layers=2, d_model=16", "float32", f"{tiny.CONFIGS['qwen2'].parameters:,} parameters"]),
    "a skeleton": (
        lambda: eqx.filter_eval_shape(Qwen.init, PRESETS["Qwen2.5-72B"], key=jax.random.key(0)),
        ["qwen2", "bfloat16", "72,706,203,648 parameters"],
    ),
    "a tree of booleans": (lambda: jax.tree.map(lambda _: True, tiny.model()), ["qwen2", "no arrays"]),
    "tokenizer": (
        lambda: Tokenizer.from_directory(EMBEDDED / "tiny-random"), ["512 tokens", "with chat template", "tiny-random"]
    ),
    "generation": (running.greedy, ["tokens=int32[4, 6]", "log_probs=float32[4, 6]", "activations=float32[12, 4, 6, 16]"]),
    "generation without capture": (lambda: running.generate([[1]], capture=None), ["activations=None"]),
    "config": (lambda: tiny.CONFIGS["qwen3"], ["model_type='qwen3'", "max_seq=64"]),
    "rows": (lambda: rows(9000), ["Rows(activations=float32[9000, 3, 8]", "generated=bool[9000]"]),
    "one row": (lambda: jax.tree.map(lambda column: column[0, ...], rows(3)), ["activations=float32[3, 8]", "item=int32[]"]),
    "plan": (lambda: MANIFEST.plan, ["Plan(items=1200, items_per_shard=100)"]),
    "manifest": (lambda: MANIFEST, ["a-model", "hook_resid_post, … (24 in all)", "bfloat16, d_model=64", "items=1200"]),
    "store": (lambda: sae.ActivationStore(EMBEDDED, MANIFEST, (), MANIFEST.sites), ["0 rows", "(24 in all)", "0 shards"]),
    "writer": (lambda: sae.StoreWriter(EMBEDDED, MANIFEST), ["pretrained", "Plan(items=1200"]),
    "shard": (
        lambda: sae.data.store.Shard(3, EMBEDDED, 77, 9000, "sha256:0", ({"text": "x" * 900},) * 100),
        ["Shard(3: 77 rows of 100 items, 9,000 bytes"],
    ),
    "survey": (
        lambda: sae.Survey.take(iter([jnp.eye(5, 1000)] * 3), d_sae=1000),
        ["15 tokens", "5 of 1,000 latents fired", "best 8 documents"],
    ),
    "transcoder": (lambda: dictionary("gated", d_out=6), ["Gated(d_model=8, d_out=6, d_sae=32, float32)"]),
    "crosscoder": (lambda: dictionary("crosscoder", sites=3), ["Crosscoder(sites=3, d_model=8, d_sae=32, k=4, float32)"]),
    "clt": (lambda: dictionary("clt", sites=2), ["CLT(sites=2, d_model=8, d_sae=32, k=4, float32)"]),
    "dictionary of booleans": (lambda: jax.tree.map(lambda _: True, dictionary("topk")), ["TopK(no arrays)"]),
    "skeleton of a dictionary": (lambda: jax.eval_shape(lambda: dictionary("topk")), ["TopK(d_model=8, d_sae=32, k=4"]),
    "clamped": (lambda: sae.Clamped(dictionary("relu"), jnp.int32(3), jnp.float32(2)), ["ReLU(d_model=8", "int32[]"]),
    "state": (state, ["TrainState(TopK(d_model=8, d_sae=32, k=4, float32), step 0, averaged)"]),
    "skeleton of a state": (lambda: jax.eval_shape(state), ["TrainState(TopK", "step int32[]"]),
    "a state that was given away": (donated, ["TrainState(TopK", "step donated"]),
    "sweep": (lambda: training.stack([state()] * 3), ["TopK(members=3, d_model=8, d_sae=32, k=4, float32), step 0"]),
    "uneven sweep": (
        lambda: dataclasses.replace(training.stack([state("relu")] * 2), step=jnp.array([3, 7], jnp.int32)),
        ["ReLU(members=2, d_model=8", "step 3 to 7"],
    ),
    "members of a sweep": (lambda: training.unstack(training.stack([state()] * 2)), ["TopK(d_model=8, d_sae=32"]),
    "loaded": (
        lambda: sae.Loaded(dictionary("topk"), dict.fromkeys("abcdef", "x" * 400), np.ones(32, np.float32)),
        ["TopK(d_model=8", "a, b, c, d, … (6 in all)", "float32[32]"],
    ),
    "code": (lambda: sae.SparseCode(jnp.zeros((99, 4), int), jnp.zeros((99, 4))), ["indices=int32[99, 4]"]),
    "buffer": (
        lambda: sae.ShuffleBuffer.init(capacity=64, d_model=8, key=jax.random.key(0)), ["bits=float32[64, 8]", "key<fry>[]"]
    ),
    "completion": (
        lambda: next(qwen_eqx.schedule(tiny.model(), [[1, 2]], slots=1, max_new_tokens=20)), ["tokens=int32[20]", "item=0"]
    ),
    "pair": (lambda: TASK.train[0], ["Pair(30x30 -> 30x30)"]),
    "task": (lambda: TASK, ["Task('007bbfb7', train 3, test 1)"]),
    "withheld": (lambda: TASK.test[0], ["Pair(5x30 -> ?)"]),
    "tasks": (lambda: arc.data.Tasks([TASK] * 400, ["x" * 99]), ["400 tasks: 007bbfb7, 007bbfb7, 007bbfb7, …; 1 skipped"]),
    "prompt": (lambda: arc.prompt.build(TASK, 0), ["characters, ending", "dropped 0 pairs"]),
    "a prompt's grid": (lambda: arc.prompt.build(TASK, 0).grids[0], ["PlacedGrid(pair 0, input, 30x30 at "]),
    "sample": (sample, ["Sample(007bbfb7, test 0, ", "Parsed("]),
    "candidate": (
        lambda: arc.vote.Candidate(arc.as_grid(GRID), 3, -1.5, (sample(),) * 50), ["30x30, votes 3 of 50 samples"]
    ),
    "report": (lambda: [report()], ["score 25.0% of 400 tasks"]),
} | {
    form: (lambda form=form: dictionary(form), [f"{sae.FORMS[form].__name__}(d_model=8, d_sae=32", "float32)"])
    for form, kind in sae.FORMS.items() if not kind.several_sites
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_a_repr_is_short_and_says_what_it_is(name: str):
    make, parts = SHOWN[name]
    value = make()
    for shown in (repr(value), str(value)):
        assert len(shown) <= 320
        assert "\n" not in shown
        for part in parts:
            assert part in shown


def test_the_version_is_that_of_the_package():
    assert qwen_eqx.__version__ == importlib.metadata.version("qwen-eqx")
