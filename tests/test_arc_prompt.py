"""Prompt texts byte for byte, their length in Qwen tokens, and fitting that never cuts a grid."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
from arc.prompt import build, prompt_text
from strategies import tasks

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "fixtures" / "arc"
QWEN = ROOT / ".." / "shared" / "data" / "qwen2.5-tokenizer"

G = arc.as_grid
TASK = arc.Task(
    "golden",
    (
        arc.Pair(G([[0, 1], [2, 3]]), G([[3, 2], [1, 0]])),
        arc.Pair(G([[5, 5, 7], [8, 9, 4]]), G([[4, 9, 8], [7, 5, 5]])),
    ),
    (arc.Pair(G([[6]]), G([[6]])), arc.Pair(G([[1, 2, 3]]), G([[3, 2, 1]]))),
)


def chatml(messages, add_generation_prompt=True):
    """What Qwen's template makes of messages that start with a system message."""
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n" * add_generation_prompt


def template_of(name):
    return chatml if arc.PROMPTS[name].system else None  # without a system message Qwen's template writes its own


@pytest.mark.parametrize("name", arc.PROMPTS)
@pytest.mark.parametrize("test", [0, 1])
def test_golden_texts(name, test):
    text = prompt_text(arc.chat_messages(TASK, test, format=name), arc.prefill(format=name), template_of(name))
    assert text.encode() == (GOLDEN / f"{name}.{test}.txt").read_bytes()


@pytest.fixture(scope="module")
def qwen():
    """(count of tokens, the real chat template) of Qwen2.5."""
    if not (QWEN / "tokenizer.json").exists():
        pytest.skip("needs Qwen's tokenizer at ../shared/data/qwen2.5-tokenizer")
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(QWEN / "tokenizer.json"))
    source = json.loads((QWEN / "tokenizer_config.json").read_text())["chat_template"]
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)

    def render(messages, add_generation_prompt):
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)

    return (lambda text: len(tokenizer.encode(text).ids)), render


@pytest.mark.parametrize("name", arc.PROMPTS)
@pytest.mark.parametrize("test", [0, 1])
def test_golden_token_counts(qwen, name, test):
    count, template = qwen
    counts = json.loads((GOLDEN / "token_counts.json").read_text())
    golden = (GOLDEN / f"{name}.{test}.txt").read_text()
    assert count(golden) == counts[f"{name}.{test}"]
    if arc.PROMPTS[name].system:
        assert prompt_text(arc.chat_messages(TASK, test, format=name), arc.prefill(format=name), template) == golden


def test_counts_over_the_real_tasks(qwen):
    """Every hundredth task; the means over all are 1,416 (v1) and 1,622 (v0) tokens."""
    count, template = qwen
    counts = json.loads((GOLDEN / "token_counts.json").read_text())
    chosen = arc.load_tasks("arc-agi-1/training")[::100]
    for name in arc.PROMPTS:
        found = {task.id: count(build(task, format=name, template=template).text) for task in chosen}
        assert found == counts[name]


@given(task=tasks())
def test_every_grid_is_in_the_prompt_in_order(task):
    encoder = arc.ENCODERS[arc.DEFAULT_ENCODER]
    for name in arc.PROMPTS:
        for test, asked in enumerate(task.test):
            at = 0
            said = arc.chat_messages(task, test, format=name)[-1]["content"]
            for grid in [*(g for p in task.train for g in (p.input, p.output)), asked.input]:
                at = said.index(encoder.encode(grid), at) + 1
            answer = arc.prompt.answer(asked.output, format=name)
            assert answer.startswith(arc.prefill(format=name))


def test_any_template_or_none():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert prompt_text(messages) == "S\n\nU\n\n"
    assert prompt_text(messages, "A") == "S\n\nU\n\nA"
    assert prompt_text(messages, "A", chatml).endswith("<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA")
    assert build(TASK, begin=False).begun == ""
    assert build(TASK).text.endswith(build(TASK).begun)


def test_a_format_of_ones_own():
    mine = arc.prompt.PromptFormat("Be {brief}.", "Go:", "{input}>{output};", "{input}>", "")
    messages = arc.chat_messages(TASK, 1, "minimal", mine)
    assert messages[0]["content"] == "Be {brief}."
    assert messages[1]["content"] == "Go:01\n23>32\n10;557\n894>498\n755;123>"


@pytest.mark.parametrize(("call", "line"), [
    (lambda: arc.chat_messages(TASK, 2), "task golden: test=2, expected 0 to 1"),
    (lambda: arc.chat_messages(TASK, -1), "task golden: test=-1, expected 0 to 1"),
    (lambda: arc.chat_messages(TASK, format="v9"),
     "prompt format: found 'v9', expected one of output-from-examples-v0, output-from-examples-v1, compact"),
    (lambda: build(TASK, budget=3), "budget: found only one of count and budget, expected both or none"),
    (lambda: build(TASK, count=len, budget=3), "task golden, test 0: found length 620 with one pair, expected 3"),
])  # fmt: skip
def test_errors(call, line):
    with pytest.raises(arc.InputError) as error:
        call()
    assert str(error.value) == line


@given(task=tasks(max_pairs=4), budget=st.integers(300, 1500), data=st.data())
def test_fitting_drops_whole_pairs_and_says_which(task, budget, data):
    test = data.draw(st.integers(0, len(task.test) - 1))
    try:
        fitted = build(task, test, count=len, budget=budget)
    except arc.InputError:
        shortest = [build(task, test, count=len, budget=10**9).length]
        shortest += [
            len(build(arc.Task(task.id, (pair,), task.test), test).text) for pair in task.train
        ]  # no single pair fits, so nothing would have
        assert min(shortest) > budget
        return
    assert fitted.length == len(fitted.text) <= budget
    kept = tuple(pair for index, pair in enumerate(task.train) if index not in fitted.dropped)
    assert fitted.text == build(arc.Task(task.id, kept, task.test), test).text
    if fitted.dropped:  # any pair more would not fit with those that stayed
        for index in fitted.dropped:
            more = tuple(p for i, p in enumerate(task.train) if i == index or i not in fitted.dropped)
            assert len(build(arc.Task(task.id, more, task.test), test).text) > budget


def test_too_long_is_told_from_every_other_mistake():
    asking = arc.Asking(count=len, budget=3)
    with pytest.raises(arc.prompt.TooLong, match="task golden, test 1: found length"):
        asking.prompt(TASK, 1)
    for wrong in (arc.Asking(format="v9", count=len, budget=3), arc.Asking("nothing", count=len, budget=3)):
        with pytest.raises(arc.InputError) as error:
            wrong.prompt(TASK, 1)
        assert not isinstance(error.value, arc.prompt.TooLong)


def test_asking_is_building_with_its_fields():
    asking = arc.Asking("shape(minimal)", "compact", begin=False, count=len, budget=100)
    built = build(TASK, 1, encoder="shape(minimal)", format="compact", begin=False, count=len, budget=100)
    assert asking.prompt(TASK, 1) == built
    assert built.dropped


def test_no_budget_drops_nothing():
    assert build(TASK).dropped == ()
    assert build(TASK).length is None
    assert np.array_equal(TASK.test[0].input, [[6]])


@given(tasks(), st.sampled_from(sorted(arc.ENCODERS)), st.sampled_from(sorted(arc.PROMPTS)), st.booleans(), st.data())
def test_every_cell_of_every_grid_is_where_the_prompt_says(task, encoder, name, fits, data):
    """In order, each with characters of its own that hold its symbol; pairs keep their numbers where some are dropped."""
    test = data.draw(st.integers(0, len(task.test) - 1))
    template = chatml if data.draw(st.booleans()) else None
    whole = build(task, test, encoder=encoder, format=name, template=template)
    budget = {} if fits else {"count": len, "budget": max(len(whole.text) - 1, 1)}
    try:
        prompt = build(task, test, encoder=encoder, format=name, template=template, **budget)
    except arc.prompt.TooLong:
        return
    grids = {(n, "input"): pair.input for n, pair in enumerate(task.train) if n not in prompt.dropped}
    grids |= {(n, "output"): pair.output for n, pair in enumerate(task.train) if n not in prompt.dropped}
    grids[len(task.train) + test, "input"] = task.test[test].input
    assert sorted({(cell.pair, cell.part) for cell in prompt.cells}) == sorted(grids)
    assert [cell.start for cell in prompt.cells] == sorted(cell.start for cell in prompt.cells)
    for (pair, part), grid in grids.items():
        mine = [cell for cell in prompt.cells if (cell.pair, cell.part) == (pair, part)]
        assert [(cell.row, cell.col, cell.colour) for cell in mine] == [(*at, int(v)) for at, v in np.ndenumerate(grid)]
        begin = mine[0].start - arc.spans.cell_spans(arc.ENCODERS[encoder], grid)[0][0][0]
        written = arc.ENCODERS[encoder].encode(grid)
        assert prompt.text[begin : begin + len(written)] == written


def test_a_template_that_takes_grids_apart_leaves_no_cells():
    def upside_down(messages, add_generation_prompt=True):
        return "".join(sorted(messages[-1]["content"]))

    prompt = build(TASK, format="compact", template=upside_down)
    with pytest.raises(arc.InputError, match="does not leave the grids"):
        _ = prompt.cells
