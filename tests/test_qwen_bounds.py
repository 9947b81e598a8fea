"""Numbers that no machine can hold are refused in one line, before anything is allocated or compiled."""

import inspect

import pytest

import qwen_eqx
import tiny
from qwen_eqx import InputError, Options
from qwen_eqx.generation import score
from qwen_eqx.model import qwen

MANY = [[1, 2, 3]] * 10
BAD = {
    "more tokens than int32": (lambda m: qwen_eqx.generate(m, [], max_new_tokens=2**31), ["max_new_tokens", "2147483647"]),
    "far more": (lambda m: qwen_eqx.generate(m, [[1]], max_new_tokens=10**30), ["max_new_tokens", "2147483647"]),
    "samples": (lambda m: qwen_eqx.generate(m, [[1]], max_new_tokens=1, samples=10**12), ["samples"]),
    "samples that fill the memory": (
        lambda m: qwen_eqx.generate(m, [[1]], max_new_tokens=9, samples=2**31 - 1), ["memory", "lower"]
    ),
    "slots": (lambda m: list(qwen_eqx.schedule(m, [[1]], max_new_tokens=9, slots=2**31 - 1)), ["memory", "lower"]),
    "a scoring batch": (lambda m: qwen_eqx.score(m, [1], [[2]], batch_size=2**31 - 1), ["memory", "batch_size"]),
    "a scoring batch beyond int32": (lambda m: qwen_eqx.score(m, [1], [[2]], batch_size=2**31), ["batch_size"]),
    "a negative seed for a key": (
        lambda m: inspect.unwrap(Options.__init__)(object.__new__(Options), max_new_tokens=1, key=-3),
        ["key: found -3", "jax.random.key"],
    ),
    "a negative item": (lambda m: qwen_eqx.generate(m, [[1]], max_new_tokens=1, items=[-1]), ["items[0]", "-1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_absurd_numbers_are_refused_in_one_line(name: str):
    call, parts = BAD[name]
    with pytest.raises(InputError) as caught:
        call(tiny.model())
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_plain_pass_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    site = "model.layers.0"
    needed = 10 * 16 * (97 + 16) * 4  # ten rows of a bucket of 16
    monkeypatch.setattr(qwen, "free_device_bytes", lambda devices=None: needed - 1)
    with pytest.raises(InputError, match=r"memory: logits, 0\.1 MB, and activations, .*lower .*logits='last'"):
        tiny.model().run_with_capture(MANY, [site])
    logits, acts = tiny.model().run_with_capture(MANY, [site], logits="last")
    assert (logits.shape, acts[site].shape) == ((10, 97), (10, 3, 16))
    monkeypatch.setattr(qwen, "free_device_bytes", lambda devices=None: needed)
    tiny.model().run_with_capture(MANY, [site])


def test_scoring_asks_for_memory_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(score, "free_device_bytes", lambda devices=None: 10)
    with pytest.raises(InputError, match=r"memory: .*lower batch_size"):
        qwen_eqx.score(tiny.model(), [1, 2], [[3]])
