"""Every wrong flag and file ever met: one line on stderr, exit 2, nothing left behind."""

import json
from pathlib import Path

import pytest

from edge import entries, refused

BIG = str(10**19)
TABLE = [  # command, flags ({file} is a path below)
    ("extract", "--seed", BIG), ("extract", "--seed", "-1"), ("extract", "--limit", BIG), ("extract", "--limit", "0"),
    ("extract", "--layers", "0:3000000000"), ("extract", "--layers", "3:1"), ("extract", "--max-new-tokens", "40000"),
    ("extract", "--model", "x" * 5000), ("extract", "--model", "~nobody/model"), ("extract", "--tasks", "x" * 5000),
    ("extract", "--tasks", "{empty}"), ("extract", "--tasks", "{surrogate}"), ("extract", "--out", "{long}"),
    ("solve_arc", "--seed", BIG), ("solve_arc", "--seed", "-1"), ("solve_arc", "--report-tasks", "-5"),
    ("solve_arc", "--solutions", "/no/x.json"), ("solve_arc", "--tasks", "{one}", "--solutions", "/no/x.json"),
    ("solve_arc", "--tasks", "{empty}"), ("solve_arc", "--tasks", "{surrogate}"),
    ("solve_arc", "--max-new-tokens", "40000"), ("solve_arc", "--model", "~nobody"), ("solve_arc", "--limit", BIG),
    ("train_sae", "--seed", BIG), ("train_sae", "--seed", "-1"), ("train_sae", "--dead-after", BIG),
    ("train_sae", "--steps", BIG), ("train_sae", "--limit", BIG), ("train_sae", "--d-sae", "900000000"),
    ("train_sae", "--buffer-rows", "900000000"), ("train_sae", "--buffer-rows", BIG), ("train_sae", "--d-sae", BIG),
    ("train_sae", "--sweep", "k=2", "k=4"), ("train_sae", "--form", "jumprelu", "--k", "1000", "--d-sae", "64"),
    ("train_sae", "--sparsity", "-1"), ("train_sae", "--sink-times", "1e-9"), ("train_sae", "--sink-times", "nan"),
    ("train_sae", "--tasks", "{empty}"), ("train_sae", "--source", "store", "--store", "x" * 5000),
    ("evaluate_sae", "--sae", "x" * 5000), ("evaluate_sae", "--sink-times", "1e-9"), ("evaluate_sae", "--limit", BIG),
    ("steer", "--strength", "1e300"), ("steer", "--strength", "nan"), ("steer", "--sae", "x" * 5000),
    ("steer", "--sae", "/no/such"), ("steer", "--limit", "0"),
    ("transform_dataset", "--dataset", "x" * 5000 + ".jsonl"), ("transform_dataset", "--max-samples", BIG),
    ("make_tiny_arc", "--seed", "-1"), ("make_tiny_arc", "--seed", BIG), ("make_tiny_arc", "--out", "{long}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "flags"), [(each[0], each[1:]) for each in TABLE], ids=lambda value: str(value)[:40]
)
def test_a_wrong_flag_is_one_line(command: str, flags: tuple[str, ...], tmp_path: Path):
    pair = {"input": [[1]], "output": [[2]]}
    task = {"train": [pair, pair], "test": [pair]}
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "one.json").write_text(json.dumps({"a": task}))
    (tmp_path / "surrogate.json").write_text(json.dumps({"a\ud800": task}))
    there = entries(tmp_path)
    named = {name: str(tmp_path / f"{name}.json") for name in ("empty", "one", "surrogate")}
    given = [flag.format(**named, long=tmp_path / ("y" * 300)) for flag in flags]
    said = refused(command, *given, *([] if "--out" in flags else ["--out", str(tmp_path / "out")]))
    assert "expected" in said or "no such" in said
    assert len(said) < 1000
    assert entries(tmp_path) == there


def test_bounds_are_said_in_help(capsys):
    import sys
    from unittest import mock

    import tyro

    from qwen_lab import RunConfig

    with mock.patch.object(sys, "argv", ["train_sae.py", "--help"]), pytest.raises(SystemExit):
        tyro.cli(RunConfig)
    said = capsys.readouterr().out
    assert "0 to 2^63 - 1" in said
    assert "1 to 10^9" in said
