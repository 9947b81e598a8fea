"""qwen_lab as scripts and notebooks use it: prompts that fit, answers read, a run that raises, one kind of error."""

import ast
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
import qwen_eqx
import qwen_lab
import sae
from qwen_lab import bounds, cli, completions, files, jobs, provenance, stopping
from qwen_lab.runs import Run
from running import ROOT, small
from sae.errors import StorageFailed
from strategies import tasks

EXPERIMENTS = ROOT / "experiments"
MODEL, TOKENIZER = qwen_eqx.from_pretrained("tiny-random")


# ---------------------------------------------------------------- prompts, documents, answers


@given(some=st.lists(tasks(), min_size=1, max_size=3), budget=st.integers(100, 700))
def test_items_are_the_test_inputs_that_fit_and_no_others(some: list[arc.Task], budget: int):
    asking = qwen_lab.asking(TOKENIZER, budget=budget, format="compact")
    fits = {
        (number, test): _fits(asking, task, test) for number, task in enumerate(some) for test in range(len(task.test))
    }
    if not any(fits.values()):
        with pytest.raises(qwen_lab.InputError, match=f"at most {budget}: found no prompt of {len(some)} tasks"):
            qwen_lab.items(some, TOKENIZER, asking, too_long="skip")
        return
    items = qwen_lab.items(some, TOKENIZER, asking, too_long="skip")
    assert [(item.task, item.test) for item in items] == [(some[n], test) for (n, test), fit in fits.items() if fit]
    for item in items:
        assert item.tokens == TOKENIZER.encode(item.prompt.text)
        assert len(item.tokens) == item.prompt.length <= budget
    if not all(fits.values()):
        with pytest.raises(arc.prompt.TooLong):
            qwen_lab.items(some, TOKENIZER, asking)


def _fits(asking: arc.Asking, task: arc.Task, test: int) -> bool:
    try:
        return asking.prompt(task, test).text != ""
    except arc.prompt.TooLong:
        return False


@given(task=tasks(max_side=4), budget=st.integers(150, 900))
def test_documents_fit_with_their_answers(task: arc.Task, budget: int):
    try:
        documents = qwen_lab.documents([task], TOKENIZER, max_tokens=budget, format="compact")
    except qwen_lab.InputError:
        documents = []
    for document in documents:
        assert len(document.tokens) <= budget
        assert document.text.endswith(arc.prompt.answer(task.test[document.test].output, format="compact"))  # pyright: ignore[reportArgumentType]
        read = [[[int(document.text[a:b]) for a, b in row] for row in grid.spans] for grid in document.grids]
        assert read == [grid.cells.tolist() for grid in document.grids]


@pytest.mark.parametrize("flags", [{"encoder": "nothing"}, {"format": "nothing"}])
def test_a_wrong_name_is_not_a_prompt_too_long(flags: dict[str, str]):
    with pytest.raises(arc.InputError, match="nothing") as caught:
        qwen_lab.asking(TOKENIZER, budget=100, **flags)
    assert not isinstance(caught.value, arc.prompt.TooLong)


@given(task=tasks(max_side=4), known=st.booleans(), changed=st.booleans())
def test_what_was_written_is_read_and_judged(task: arc.Task, known: bool, changed: bool):
    asking = qwen_lab.asking(TOKENIZER, budget=10_000, encoder="shape(minimal)", format="compact")
    asked = task if known else task.without_answers()
    for item in qwen_lab.items([asked], TOKENIZER, asking):
        grid = np.array(task.test[item.test].output)
        grid[0, 0] = (grid[0, 0] + changed) % 10
        said = arc.prompt.answer(arc.as_grid(grid), "shape(minimal)", "compact").removeprefix(item.prompt.begun)
        tokens = np.asarray([*TOKENIZER.encode(said), TOKENIZER.eos_ids[0]], np.int32)
        sample = completions.as_sample(item.request, tokens, -1.5, TOKENIZER)
        assert (sample.completion.text, sample.completion.log_prob) == (said, -1.5)
        assert np.array_equal(sample.grid, grid)  # pyright: ignore[reportArgumentType]
        assert qwen_lab.outcome(sample, asked) == ("parsed" if not known else "wrong" if changed else "correct")
        nothing = completions.as_sample(item.request, tokens[-1:], 0.0, TOKENIZER)
        assert qwen_lab.outcome(nothing, asked) == "nothing"


def test_generation_stops_and_pads_with_the_tokenizers_tokens():
    plain = qwen_eqx.generate(MODEL, [[40, 41, 42], [50, 51]], max_new_tokens=8)
    stop = int(plain.tokens[0, 2])  # as if this were the end of a text
    stopping_there = dataclasses.replace(TOKENIZER, eos_ids=(stop,))
    out = qwen_lab.generate(MODEL, stopping_there, [[40, 41, 42], [50, 51]], 8)
    first = plain.tokens[0].tolist().index(stop)
    assert out.lengths[0] == first + 1
    assert set(out.tokens[0, first + 1 :].tolist()) == {TOKENIZER.pad_id}
    np.testing.assert_array_equal(qwen_lab.tokens_of(out, 0), plain.tokens[0, : first + 1])


# ---------------------------------------------------------------- a run


def test_train_goes_from_a_config_to_modules_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = small(tmp_path, model="no-such-model", steps=4)  # the model at hand is the one that is used
    results = qwen_lab.train(config, loaded=(MODEL, TOKENIZER))
    assert capsys.readouterr() == ("", "")
    (result,) = results.values()
    assert (result.dictionary.name, result.dictionary.place.reads) == ("sae", ("blocks.2.hook_resid_post",))
    again = qwen_lab.load_dictionary(result.saved, MODEL.config)
    np.testing.assert_array_equal(again.module.decoder, result.dictionary.module.decoder)
    assert again.place == result.dictionary.place
    assert {name: again.metadata[name] for name in ("held_out_tasks", "model_name")} == {
        name: result.dictionary.metadata[name] for name in ("held_out_tasks", "model_name")
    }
    resumed = qwen_lab.train(config, loaded=(MODEL, TOKENIZER))
    assert resumed["sae"].metrics == result.metrics
    assert (tmp_path / "run.json").exists()


def start(out: Path, **fields: Any) -> Run:
    config = small(out, **fields)
    job = jobs.open_job(config, (MODEL, TOKENIZER))
    return Run.start(config, job.members, job.source)


def test_a_loss_that_is_not_finite_raises_and_the_handler_is_put_back(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(qwen_lab.RunError, match=r"step \d+: the loss is not finite.*--lr") as caught:
        start(tmp_path, lr=1e30, steps=40).proceed()
    assert isinstance(caught.value.__cause__, sae.NotFinite)
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) is before


def test_stopping_saves_and_the_handler_is_put_back(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    run = start(tmp_path)
    with pytest.raises(stopping.Stopped):
        run.proceed(lambda steps, note: run.stop())
    assert signal.getsignal(signal.SIGTERM) is before
    assert run.step == 2
    assert start(tmp_path).step == 2


def test_a_run_works_outside_the_main_thread(tmp_path: Path):
    run, taken = start(tmp_path, steps=4), []
    thread = threading.Thread(target=lambda: run.proceed(lambda steps, note: taken.append(steps)))
    thread.start()
    thread.join()
    assert taken == [2, 2]


def test_wrong_input_writes_nothing(tmp_path: Path):
    with pytest.raises(qwen_lab.InputError, match="--buffer-rows"):
        start(tmp_path / "out", buffer_rows=100)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- errors and exit codes


@dataclasses.dataclass(frozen=True)
class Flags:
    seed: int = 0


ENDS = {
    "lab": (qwen_lab.InputError("--seed: wrong"), 2, "error: --seed: wrong\n"),
    "model": (qwen_eqx.InputError("x"), 2, "error: x\n"),
    "puzzles": (arc.InputError("x"), 2, "error: x\n"),
    "dictionaries": (sae.InputError("x"), 2, "error: x\n"),
    "storage": (
        StorageFailed("s3://b/x", "read", 8, TimeoutError("two\nlines")),
        1,
        "error: s3://b/x: found 8 failures (",
    ),
    "run": (qwen_lab.RunError("two\nlines"), 1, "error: two lines\n"),
    "stopped": (stopping.Stopped(), 75, "stopped: "),
    "interrupted": (KeyboardInterrupt(), 130, "interrupted: "),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_end_has_its_exit_code_and_one_line(name: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    error, code, line = ENDS[name]

    def main(config: Flags) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        cli.run(main, Flags)
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert said.startswith(line)
    assert said.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_stops_a_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda config: os.kill(os.getpid(), signal.SIGTERM), Flags)
    assert ended.value.code == 75


def test_the_lab_raises_its_own_error_and_no_other_packages():
    for path in [*EXPERIMENTS.glob("*.py"), *EXPERIMENTS.glob("qwen_lab/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised = ast.unparse(node.exc.func)
                assert not raised.endswith(".InputError"), f"{path.name}:{node.lineno}: {raised}"
                assert raised not in ("SystemExit", "sys.exit"), f"{path.name}:{node.lineno}: {raised}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.exit":
                assert path.name == "cli.py", f"{path.name}:{node.lineno}: only a command's edge exits"


def test_bounds_stand_at_the_flag_and_none_is_no_number():
    @dataclasses.dataclass(frozen=True)
    class Few:
        """Flags."""

        limit: bounds.Count | None = 1

    bounds.check(Few())
    bounds.check(Few(None))
    for wrong in (0, -1, 10**9 + 1):
        with pytest.raises(qwen_lab.InputError, match=rf"--limit: found {wrong}, expected at"):
            bounds.check(Few(wrong))


def test_every_public_name_is_imported_when_it_is_asked_for():
    assert {"InputError", "RunConfig", "Stopped", "train"} <= set(qwen_lab.__all__) <= set(dir(qwen_lab))
    for name in qwen_lab.__all__:
        assert getattr(qwen_lab, name).__module__.startswith("qwen_lab."), name
    code = "import sys, qwen_lab.stopping; assert not {'jax', 'sae', 'arc'} & set(sys.modules); qwen_lab.InputError"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qwen_lab.nothing  # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------- files and provenance


def test_a_directory_is_made_or_refused(tmp_path: Path):
    files.fresh_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(qwen_lab.InputError, match="--out"):
            files.fresh_directory(path)


def test_the_revision_is_of_this_checkout_and_of_no_other(tmp_path: Path, monkeypatch):
    git = ["git", "-C", str(ROOT)]
    tracked = subprocess.run([*git, "ls-files", "--error-unmatch", provenance.__file__], capture_output=True)
    if tracked.returncode == 0:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        assert (provenance.git_revision() or "").removesuffix("+changes") == head
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "provenance.py").write_text("")  # an environment inside somebody's checkout
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.git_revision() is None


def test_the_map_has_a_row_for_every_command():
    page = (EXPERIMENTS / "README.md").read_text()
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(path.name for path in EXPERIMENTS.glob("*.py"))


@given(tasks())
def test_tokens_know_the_cell_they_stand_in(task: arc.Task):
    prompt = arc.prompt.build(task, template=TOKENIZER.render_chat)
    ids, offsets = TOKENIZER.encode_with_offsets(prompt.text)
    owners = qwen_lab.cells_of_tokens(prompt.cells, offsets)
    assert len(owners) == len(ids)
    for (start, end), cell in zip(offsets, owners, strict=True):
        held = [each for each in prompt.cells if each.start < end and start < each.end]
        assert cell == (held[0] if held else None)
    assert {cell for cell in owners if cell} <= set(prompt.cells)
