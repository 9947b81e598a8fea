"""What is printed in a notebook fits on a line or two, whatever it holds."""

import importlib.metadata

import equinox as eqx
import jax
import pytest

import qwen_eqx
import running
import tiny
from qwen_eqx import PRESETS, Qwen, Tokenizer
from qwen_eqx.weights.hub import EMBEDDED

SHOWN = {
    "model": (tiny.model, ["qwen2", "layers=2, d_model=16", "float32", f"{tiny.CONFIGS['qwen2'].parameters:,} parameters"]),
    "a skeleton": (
        lambda: eqx.filter_eval_shape(Qwen.init, PRESETS["Qwen2.5-72B"], key=jax.random.key(0)),
        ["qwen2", "bfloat16", "72,706,203,648 parameters"],
    ),
    "a tree of booleans": (lambda: jax.tree.map(lambda _: True, tiny.model()), ["qwen2", "no arrays"]),
    "tokenizer": (
        lambda: Tokenizer.from_directory(EMBEDDED / "tiny-random"), ["512 tokens", "with chat template", "tiny-random"]
    ),
    "generation": (running.greedy, ["tokens=int32[4, 6]", "log_probs=float32[4, 6]", "activations=float32[10, 4, 6, 16]"]),
    "generation without capture": (lambda: running.generate([[1]], capture=None), ["activations=None"]),
    "config": (lambda: tiny.CONFIGS["qwen3"], ["model_type='qwen3'", "max_seq=64"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_a_repr_is_short_and_says_what_it_is(name: str):
    make, parts = SHOWN[name]
    for shown in (repr(make()), str(make())):
        assert len(shown) <= 320
        for part in parts:
            assert part in shown


def test_the_version_is_that_of_the_package():
    assert qwen_eqx.__version__ == importlib.metadata.version("qwen-eqx")
