"""Progress of a generation: plain numbers from inside the one compiled loop, which is the same without them."""

import io
import itertools
import math
import time
from contextlib import redirect_stderr
from typing import Any

import equinox as eqx
import jax
import pytest

import qwen_eqx
import running
import tiny
from qwen_eqx import InputError, Progress
from qwen_eqx.generation.generate import _generate, _Outputs
from qwen_eqx.generation.progress import check_progress
from running import PROMPTS, assert_same

NEW = 21


def generate(**options: Any) -> qwen_eqx.Generation:
    return running.generate(PROMPTS, max_new_tokens=NEW, **options)


@pytest.mark.parametrize("stops", [False, True])
def test_a_function_hears_plain_numbers_and_changes_nothing(stops: bool):
    stop = {"stop_tokens": [int(generate().tokens[1, 5])]} if stops else {}
    heard: list[Progress] = []
    told = generate(progress=heard.append, **stop)
    plain = generate(**stop)
    assert_same(told, plain, exact=True)
    first, *_, last = heard
    assert (first.steps, first.tokens, first.seconds) == (1, 4, 0.0)
    assert (first.tok_per_s, first.seconds_left) == (0.0, math.inf)
    assert stops or [each.steps for each in heard] == [1, 8, 16, NEW]
    assert (last.tokens, last.rows_done, last.rows) == (int(plain.lengths.sum()), 4, 4)
    assert (last.max_steps, last.seconds_left) == (NEW, 0.0)
    assert last.tok_per_s == (last.tokens - 4) / last.seconds > 0
    for earlier, later in itertools.pairwise(heard):
        assert earlier.steps <= later.steps
        assert earlier.tokens <= later.tokens
        assert earlier.seconds <= later.seconds
    assert {type(number) for each in heard for number in each} == {int, float}
    again: list[Progress] = []
    generate(progress=again.append, **stop)  # another listener, the same program
    assert [each[:5] for each in again] == [each[:5] for each in heard]


def test_true_writes_one_line_on_stderr():
    with redirect_stderr(io.StringIO()) as said:
        out = generate(progress=True)
    assert_same(out, generate(), exact=True)
    assert said.getvalue().count("\n") == 1
    assert said.getvalue().startswith("\rgenerate: 4 tokens")
    states = said.getvalue().rstrip("\n").split("\r")[1:]
    assert all(len(state) < 100 for state in states)
    assert states[-1].startswith(f"generate: {4 * NEW} tokens, ")
    assert states[-1].rstrip().endswith("tok/s, 4 of 4 rows done")


@pytest.mark.parametrize("progress", [None, False])
def test_without_it_nothing_is_said_and_the_program_calls_nobody(
    progress: bool | None, capfd: pytest.CaptureFixture[str]
):
    generate(progress=progress)
    assert capfd.readouterr() == ("", "")
    generator, batch = qwen_eqx.prepare(tiny.model(), PROMPTS, max_new_tokens=NEW)

    def program(function, *watcher: jax.Array | int | None) -> str:
        return eqx.filter_jit(function).lower(tiny.model(), generator, batch, *watcher).as_text()

    def plain(model, generator, batch):
        def steps(state):
            return jax.lax.fori_loop(0, generator.settings.stride, lambda _, s: generator.step(model, s), state)

        state, prompt_activations = generator.prefill(model, batch)
        state = jax.lax.while_loop(lambda s: ~s.done.all(), steps, state)
        return _Outputs(state.tokens, state.length, state.log_probs, state.buffer, prompt_activations)

    unwatched = program(_generate.__wrapped__, None, None)
    assert "callback" not in unwatched
    assert "callback" in program(_generate.__wrapped__, jax.numpy.int32(0), None)
    assert unwatched.replace("_generate", "plain") == program(plain)


def test_what_it_raises_is_raised_here_and_one_token_is_enough():
    def tired(progress: Progress) -> None:
        heard.append(progress)
        raise KeyError("enough")

    heard: list[Progress] = []
    with pytest.raises(KeyError, match="enough"):
        generate(progress=tired)
    assert len(heard) == 1
    heard.clear()
    running.generate(PROMPTS, max_new_tokens=1, progress=heard.append)
    assert heard[-1][:5] == (4, 4, 4, 1, 1)
    heard.clear()
    running.generate([], progress=heard.append)
    assert heard == []


def test_a_slow_listener_hears_all():
    heard: list[int] = []

    def slow(progress: Progress) -> None:
        time.sleep(0.05)
        heard.append(progress.steps)

    generate(progress=slow)
    assert heard == [1, 8, 16, NEW]


@pytest.mark.parametrize("progress", [3, "yes", [print]])
def test_who_cannot_be_told_is_refused(progress: object):
    with pytest.raises(InputError, match=r"^progress: found .*, expected None, True or a function of a Progress$"):
        check_progress(progress)
