"""A disk that is full: one line with the path, exit 1, nothing half-written, and the same command again goes on."""

import errno
import json
from pathlib import Path

import pytest
import safetensors

from edge import at_edge, entries, files_of_at_most
from qwen_lab import errors
from running import SMALL_STAGES, short_tasks

EXTRACT = "--limit 2 --max-new-tokens 2 --items-per-shard 1 --batch-size 1"
TRAIN = (
    "--limit 3 --held-out 1 --max-new-tokens 2 --d-sae 32 --k 4 --steps 4 --batch-size 32 --steps-per-call 2 "
    "--max-prompt 512 --buffer-rows 8192"
)
LEARN = (
    "--steps 2 --blocks 1 --d-model 16 --heads 2 --kv-heads 1 --d-ff 16 --families mirror --sides 3,4 --encoder padded(4) "
    "--held-out-families frame --steps-per-call 2 --batch-size 2 --eval-tasks 1 --workers 0"
)
CASES = [  # command, flags, bytes that a file may have, what could not be written
    ("extract", EXTRACT, 40, "manifest.json"),
    ("extract", EXTRACT, 5000, "activations"),
    ("solve_arc", "--limit 1 --max-new-tokens 2 --predictions-per-task 2", 400, ""),
    ("solve_arc", "--limit 1 --max-new-tokens 2 --predictions-per-task 2", 6000, "report.html"),
    ("train_sae", TRAIN, 400, "run.json"),
    ("train_sae", TRAIN, 5000, ""),
    ("train_lm", LEARN, 400, "run.json"),
    ("train_lm", LEARN, 5000, "checkpoints"),
    ("evaluate_lm", "--tasks-per-family 0 --votes 1 --slots 2 --max-new-tokens 2", 400, "run.json"),
    ("pipeline", SMALL_STAGES, 400, "run.json"),
    ("pipeline", SMALL_STAGES, 6000, "activations"),
    ("transform_dataset", "", 100, ""),
    ("make_tiny_random", "", 5000, ""),
]


def flags_of(command: str, flags: str, where: Path) -> list[str]:
    given = [*flags.split(), "--out", str(where / "out")]
    if command == "transform_dataset":
        pairs = [[[[colour]], [[colour]]] for colour in range(4)]
        (where / "data.jsonl").write_text(json.dumps({"examples": pairs}) + "\n")
        return [*given, "--dataset", str(where / "data.jsonl")]
    if command in ("make_tiny_random", "train_lm"):
        return given
    name = {"pipeline": "--extract.tasks", "evaluate_lm": "--data"}.get(command, "--tasks")
    return [*given, name, str(short_tasks(where))]


@pytest.mark.parametrize(("command", "flags", "size", "what"), CASES)
def test_a_full_disk_is_one_line_and_the_run_goes_on(command: str, flags: str, size: int, what: str, tmp_path: Path):
    given = flags_of(command, flags, tmp_path)
    with files_of_at_most(size):
        code, said = at_edge(command, *given)
    assert code == 1, said
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert "bytes free (File too large), expected room for" in said
    assert str(tmp_path / "out") in said
    assert not [name for name in entries(tmp_path / "out") if name.endswith(".tmp")]
    if command != "make_tiny_random":
        assert at_edge(command, *given)[0] == 0


def test_reports_and_pictures_too(tmp_path: Path):
    trained = str(tmp_path / "trained" / "sae")
    tasks = ["--tasks", str(short_tasks(tmp_path))]
    assert at_edge("train_sae", *TRAIN.split(), *tasks, "--out", str(tmp_path / "trained"))[0] == 0
    cases = [
        ("evaluate_sae", 3000, "densities.svg"),
        ("evaluate_sae", 20_000, ""),
        ("steer", 100, "run.json"),
        ("find_features", 400, "run.json"),
        ("find_features", 2500, ""),
    ]
    for number, (command, size, what) in enumerate(cases):
        out = tmp_path / f"out{number}"
        with files_of_at_most(size):
            code, said = at_edge(command, "--sae", trained, *tasks, "--limit", "2", "--out", str(out))
        assert (code, said.count("\n")) == (1, 1), said
        assert f"error: {out / what}" in said
        assert not [name for name in entries(out) if name.endswith(".tmp")]


def test_rust_and_others_are_understood(tmp_path: Path):
    error = safetensors.SafetensorError("Error: I/O error: No space left on device (os error 28)")
    assert "No space left on device" in (errors.full(error, tmp_path / "file") or "")
    assert errors.full(OSError(errno.EACCES, "denied"), tmp_path) is None
    assert errors.full(ValueError("os error"), tmp_path) is None
    said = errors.full(OSError(errno.ENOSPC, "No space left on device", "/nowhere/file"), tmp_path, 1234)
    assert said is not None
    assert said.startswith("/nowhere/file: found ")
    assert said.endswith("expected room for 1,234 bytes")
