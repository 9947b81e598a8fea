"""Every wrong flag and file ever met: one line on stderr, exit 2, nothing left behind."""

import json
from pathlib import Path

import pytest

from edge import at_edge, entries, refused

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
    ("trace_circuit", "--transcoders", "x" * 5000), ("trace_circuit", "--hold", "1_2_3"), ("trace_circuit", "--nodes", "2"),
    ("trace_circuit", "--batch", "0"), ("trace_circuit", "--row", "-1"),
    ("study_circuits", "--families", "recolour"), ("study_circuits", "--puzzles", "0"),
    ("transform_dataset", "--dataset", "x" * 5000 + ".jsonl"), ("transform_dataset", "--max-samples", BIG),
    ("train_sae", "--form", "relu", "--k", "3"), ("train_sae", "--form", "gated", "--k", "3"),
    ("train_sae", "--form", "relu", "--sweep", "k=3,5"), ("train_sae", "--form", "gated", "--sweep", "lr=1e-3", "k=3"),
    ("train_sae", "--form", "no-such"), ("train_sae", "--bias-rate", "x"), ("train_sae", "--layer", "x"),
    ("extract", "--seed", "abc"), ("extract", "--seed", "1e3"), ("extract", "--seed"), ("extract", "--limit", "1.5"),
    ("extract", "--dtype", "int8"), ("extract", "--sed", "3"), ("extract", "stray"), ("extract", "--seed", "x" * 5000),
    ("solve_arc", "--colours", "maybe"), ("solve_arc", "--temperature", "warm"), ("steer", "--strength", ""),
    ("evaluate_sae", "--k", "all"), ("transform_dataset", "--max-samples", "many"), ("make_tiny_random", "--layers", "3"),
    ("train_lm", "--sides", "6,3"), ("train_lm", "--sides", "3"), ("train_lm", "--sides", "3,31"),
    ("train_lm", "--lr", "nan"), ("train_lm", "--steps", BIG), ("train_lm", "--families", "nothing"),
    ("train_lm", "--heads", "3"),
    ("train_lm", "--context-length", "20"), ("train_lm", "--encoder", "nothing"), ("train_lm", "--turned", "2"),
    ("train_lm", "--small", "2"),
    ("train_lm", "--init", "x" * 5000), ("train_lm", "--tokenizer", "~nobody"), ("train_lm", "--optimizer", "sgd"),
    ("evaluate_lm", "--model", "x" * 5000), ("evaluate_lm", "--held-out-families", "nothing"),
    ("evaluate_lm", "--votes", "0"), ("evaluate_lm", "--tasks-per-family", "0"),
    ("evaluate_lm", "--data", "/no/such"), ("evaluate_lm", "--sides", "0,3"),
    ("find_rules", "--families", "recolour"), ("find_rules", "--tasks-per-family", "7"), ("find_rules", "--sides", "6,3"),
    ("find_features", "--sae", "/no/such"), ("find_features", "--best", "0"), ("find_features", "--seed", "-1"),
    ("train_lm", "--track", "nothing"), ("train_sae", "--track", "nothing"),
    ("pipeline", "--stages", "nothing"), ("pipeline", "--stages", ""), ("pipeline", "--train.steps", BIG),
    ("pipeline", "--train.steps", "x"), ("pipeline", "--train.stepz", "3"), ("pipeline", "--nothing.steps", "3"),
    ("pipeline", "--train.form", "relu", "--train.k", "3"), ("pipeline", "--train.layer", "9"),
    ("pipeline", "--train.source", "live"), ("pipeline", "--train.sweep", "k=2", "k=4"),
    ("pipeline", "--extract.layers", "77"), ("pipeline", "--extract.layers", "3:1"),
    ("pipeline", "--extract.model", "x" * 5000), ("pipeline", "--extract.tasks", "{empty}"),
    ("pipeline", "--extract.encoder", "nothing"), ("pipeline", "--transform.dataset", "/no/such.jsonl"),
    ("pipeline", "--transform.dataset", "{one}", "--transform.max-train-pairs", "1"),
    ("pipeline", "--evaluate.sink-times", "nan"), ("pipeline", "--evaluate.limit", "0"),
    ("pipeline", "--stages", "train"), ("pipeline", "--stages", "evaluate"), ("pipeline", "--config", "/no/such.toml"),
    ("pipeline", "--config", "{one}"), ("pipeline", "--config", "x" * 5000), ("pipeline", "--config"),
    ("pipeline", "--out", "{long}"), ("pipeline", "--track", "nothing"),
    ("make_tiny_random", "--seed", "-1"), ("make_tiny_random", "--seed", BIG), ("make_tiny_random", "--out", "{long}"),
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


SAID = {
    ("extract", "--seed", "abc"): "--seed: found 'abc', expected a whole number",
    ("extract", "--limit", "abc"): "--limit: found 'abc', expected a whole number",
    ("solve_arc", "--temperature", "warm"): "--temperature: found 'warm', expected a number",
    ("train_sae", "--sparsity", "x"): "--sparsity: found 'x', expected a number",
    (
        "train_sae",
        "--form",
        "relu",
        "--k",
        "3",
    ): "--k: found 3, expected none: relu has no k, --sparsity says how many fire",
    ("extract", "--out"): "--out: found no value, expected one",
    ("extract", "--dtype", "int8"): "--dtype: found 'int8', expected one of 'bfloat16', 'float32'",
    ("extract", "--sed", "3"): "flags: found --sed, 3, expected those that --help names (such as --seed)",
    ("steer", "stray"): "flags: found stray, expected those that --help names",
}


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_what_the_parser_draws_in_a_box_is_worded_as_our_errors_are(columns: str, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("COLUMNS", columns)
    for (command, *flags), line in SAID.items():
        assert refused(command, *flags) == f"error: {line}\n"


def test_help_is_no_error():
    assert at_edge("train_sae", "--help") == (0, "")


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
