"""Ctrl-C and SIGTERM in every phase of every command: the exit code, one line, and a run that goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_lab import stopping
from running import ROOT, SMALL_STAGES, save_small, short_tasks
from sae.training import checkpoint

IMPORTS = ("jax", "-")
COMPILE = ("jax._src.compiler", "compile_or_get_cached")
MODEL = ("qwen_eqx.generation.generate", "generate")
DECODE = (
    "qwen_eqx.generation.generate",
    "generate+15",
)  # seconds: its program is compiled by then, and runs for minutes
READING = ("qwen_eqx.model.effect", "captured")
SPLICING = ("qwen_eqx.model.effect", "effects")
SCHEDULE = ("qwen_eqx.generation.scheduler", "schedule")
FORWARD = ("qwen_lab.reading", "start")
WRITE = ("sae.files", "commit")
TRAINING = ("sae.training.loop", "run")
LESSONS = ("qwen_eqx.training.loop", "run")
MATCHING = ("qwen_lab.features", "matched")
REMOVAL = ("qwen_lab.features", "removed")
RECORD = ("arc.data", "task_from_examples")
CODES = {"SIGINT": 130, "SIGTERM": 75}
SMALL = {
    "extract": "--limit 3 --max-new-tokens 4 --batch-size 2 --items-per-shard 1",
    "solve_arc": "--limit 2 --max-new-tokens 4 --predictions-per-task 2",
    "train_sae": "--limit 3 --held-out 1 --max-new-tokens 2 --d-sae 32 --k 4 --steps 6 --batch-size 32 --steps-per-call 2 "
    "--max-prompt 512 --buffer-rows 8192",
    "steer": "--limit 1 --max-new-tokens 30000 --max-prompt 512 --latent 3",
    "evaluate_sae": "--limit 3 --max-prompt 512 --timelines 0",
    "transform_dataset": "",
    "make_tiny_random": "",
    "train_lm": "--steps 6 --blocks 1 --d-model 16 --heads 2 --kv-heads 1 --d-ff 16 --families mirror --sides 3,4 "
    "--encoder padded(4) --held-out-families frame --steps-per-call 2 --batch-size 2 --eval-tasks 1 --workers 0",
    "evaluate_lm": "--tasks-per-family 0 --votes 1 --slots 2 --max-new-tokens 4",
    "find_features": "--limit 3 --max-prompt 512 --best 2",
    "pipeline": SMALL_STAGES,
}
CASES = [
    (command, IMPORTS, number) for command in SMALL for number in CODES if number == "SIGINT" or command == "extract"
]
CASES += [
    ("extract", COMPILE, "SIGINT"), ("extract", SCHEDULE, "SIGTERM"), ("extract", WRITE, "SIGINT"),
    ("extract", FORWARD, "SIGTERM"),
    ("solve_arc", COMPILE, "SIGTERM"), ("solve_arc", SCHEDULE, "SIGINT"), ("solve_arc", WRITE, "SIGINT"),
    ("train_sae", MODEL, "SIGINT"), ("train_sae", TRAINING, "SIGINT"), ("train_sae", TRAINING, "SIGTERM"),
    ("transform_dataset", RECORD, "SIGINT"), ("transform_dataset", WRITE, "SIGTERM"),
    ("make_tiny_random", COMPILE, "SIGINT"), ("steer", COMPILE, "SIGTERM"), ("steer", MODEL, "SIGINT"),
    ("steer", DECODE, "SIGINT"), ("steer", DECODE, "SIGTERM"), ("evaluate_sae", COMPILE, "SIGTERM"),
    ("evaluate_sae", READING, "SIGINT"), ("evaluate_sae", SPLICING, "SIGINT"), ("evaluate_sae", SPLICING, "SIGTERM"),
    ("evaluate_sae", WRITE, "SIGTERM"),
    ("train_lm", LESSONS, "SIGINT"), ("train_lm", LESSONS, "SIGTERM"), ("train_lm", COMPILE, "SIGTERM"),
    ("evaluate_lm", SCHEDULE, "SIGINT"), ("evaluate_lm", COMPILE, "SIGTERM"),
    ("find_features", READING, "SIGINT"), ("find_features", MATCHING, "SIGINT"), ("find_features", REMOVAL, "SIGTERM"),
    ("pipeline", COMPILE, "SIGTERM"), ("pipeline", WRITE, "SIGINT"), ("pipeline", TRAINING, "SIGTERM"),
    ("pipeline", SPLICING, "SIGINT"),
]  # fmt: skip


def flags_of(command: str, where: Path) -> list[str]:
    flags = [*SMALL[command].split(), "--out", str(where / "out")]
    if command in ("extract", "solve_arc", "train_sae", "find_features"):
        flags += ["--tasks", str(short_tasks(where))]
    if command == "evaluate_lm":
        flags += ["--data", str(short_tasks(where))]
    if command == "pipeline":
        flags += ["--extract.tasks", str(short_tasks(where))]
    if command in ("steer", "evaluate_sae", "find_features"):
        flags += ["--sae", save_small(where / "sae")]
    if command == "transform_dataset":
        pairs = [[[[colour]], [[colour]]] for colour in range(4)]
        (where / "data.jsonl").write_text(json.dumps({"examples": pairs}) + "\n")
        flags += ["--dataset", str(where / "data.jsonl")]
    return flags


def run_until(number: str, phase: tuple[str, str], command: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """A command that gets a signal in a phase."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_at.py"), number, *phase, command, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize(
    ("command", "phase", "number"), CASES, ids=lambda value: value if isinstance(value, str) else value[1]
)
def test_a_signal_ends_a_command_in_one_line(command: str, phase: tuple[str, str], number: str, tmp_path: Path):
    done = run_until(number, phase, command, flags_of(command, tmp_path))
    assert done.returncode == CODES[number], done.stderr
    assert done.stderr == stopping.LINES[CODES[number]] + "\n"
    results = {
        "steer": "steer.json", "evaluate_sae": "metrics.json", "evaluate_lm": "metrics.json",
        "find_features": "features.json", "pipeline": "index.html",
    }  # fmt: skip
    assert not (tmp_path / "out" / results.get(command, "none")).exists()
    if phase in (TRAINING, LESSONS):
        where = tmp_path / "out" / ("train" if command == "pipeline" else "")
        assert checkpoint.steps(where / "checkpoints") == [2]
    if phase == RECORD:
        assert json.loads((tmp_path / "out" / "state.json").read_text())["tasks"] == 1


HELD = """
import os, signal, time
import qwen_lab.stopping as stopping
stopping.install()
with stopping.held():
    os.kill(os.getpid(), signal.{first})
    time.sleep(0.2)
    assert stopping.asked()
    os.kill(os.getpid(), signal.{second})
    signal.pause()
"""


GRACE = """
import os, signal, time
import qwen_lab.stopping as stopping
stopping.install()
with stopping.held(), stopping.within(0.5):
    os.kill(os.getpid(), signal.{number})
    time.sleep(60)  # as a call of C may that looks for nothing
"""


@pytest.mark.parametrize("number", CODES)
def test_what_must_end_soon_does_though_nobody_looks(number: str):
    done = subprocess.run(
        [sys.executable, "-c", GRACE.format(number=number)], capture_output=True, text=True, timeout=40
    )
    assert done.returncode == CODES[number]
    assert done.stderr == stopping.LINES[CODES[number]] + "\n"


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_a_second_signal_ends_at_once(first: str, second: str):
    code = HELD.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == CODES[second]
    assert done.stderr == stopping.LINES[CODES[second]] + "\n"


def test_a_signal_waits_for_check_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in stopping.CODES]
    reached = []

    def checked() -> None:
        with stopping.held():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(stopping.asked())
            stopping.check()

    def unchecked() -> None:
        with stopping.held():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        checked()
    with pytest.raises(stopping.Stopped):
        unchecked()
    assert reached == [True, True]
    assert [signal.getsignal(number) for number in stopping.CODES] == before
    stopping.check()
