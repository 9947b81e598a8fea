"""Every benchmark runs on a tiny shape and prints its table; no time is asserted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNS = {
    "decode": ["--dtypes", "bfloat16", "--batches", "2", "--prompt", "20", "--steps", "2", "--repeats", "1"],
    "prefill": ["--prompts", "20", "--repeats", "1"],
    "capture": ["--batches", "2", "--layers", "1", "--prompt", "20", "--lengths", "16", "--steps", "2", "--repeats", "1"],
    "reading": ["--prompt", "20", "--layers", "1", "--repeats", "1", "--runs", "2", "--patched-prompt", "9"],
    "trace": ["--prompts", "9", "--d-sae", "24", "--k", "3", "--batch", "4", "--repeats", "1"],
    "scheduler": ["--prompts", "6", "--slots", "2", "--prompt", "9", "--longest", "12", "--fixed", "13"],
    "sae_step": ["--calls", "1", "--members", "2", "--dtypes", "float32"],
    "train": ["--batch", "2", "--seq", "17", "--steps", "1", "--repeats", "1"],
    "synth": ["--forms", "topk", "jumprelu", "--seeds", "0", "--passes", "1"],
    "extract": ["--prompts", "20", "--layers", "1", "--batch-tokens", "64", "--batches", "2", "--repeats", "1",
                "--d-sae", "32", "--rows", "8", "--steps", "3"],
    "scaling": ["--model", "1", "2", "--devices", "4"],
    "compile": ["--batch", "2", "--prompt", "20", "--max-new-tokens", "4", "--layers", "1"],
}  # fmt: skip


def run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'experiments'}", "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_and_prints_its_table(name: str, tmp_path: Path):
    work = ["--work", str(tmp_path)] if name == "synth" else []
    done = run(name, "--shape", "tiny", *RUNS[name], *work)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("## ") for line in lines)
    assert any(f"benchmarks/{name}.py --shape tiny" in line and "commit" in line for line in lines), "no provenance"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) >= 3
    assert any(character.isdigit() for character in table[2])


def test_a_wrong_shape_is_one_line():
    done = run("decode", "--shape", "no-such")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: shape: found 'no-such'")


def test_a_peer_that_cannot_run_is_one_line(tmp_path: Path):
    done = run("prefill", "--shape", "tiny", "--prompts", "20", "--peer-python", str(tmp_path / "python"))
    assert done.returncode == 2
    assert "peer-python" in done.stderr.strip().splitlines()[-1]


TPU = ["--shape", "tiny", "--prompt", "20", "--max-new-tokens", "12", "--programs", "loop", "step"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is here")
def test_a_missing_tpu_compiler_is_one_line():
    done = run("tpu_plan", *TPU)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: libtpu: not installed")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jax[tpu]'")
def test_the_tpu_compiler_exchanges_what_is_foretold_and_updates_in_place():
    """Rows alone: nothing in a step, in the loop whether any row goes on. Weights: two sums a block, embedding, logits."""
    done = run("tpu_plan", *TPU, "--topologies", "v5e:2x2")
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    found = {(row[0], row[2]): dict(zip(table[0], row, strict=True)) for row in table[2:]}
    assert len(found) == 6
    for (program, mesh), row in found.items():
        more = program == "loop" and mesh != "data=1,model=1"
        sums = 5 * mesh.endswith("model=2") + more
        gathered = ["1 all-gather"] * mesh.endswith("model=2")
        assert row["collectives"] == (", ".join([*gathered, f"{sums} all-reduce"] if sums else gathered) or "–")
        assert row["in place MB"] == row["outputs MB"]
        assert row["copies MB"] == "–"  # the activation buffer lies as the loop wants it


def test_llama_cpp_is_asked_and_shown(tmp_path: Path):
    """A stand-in that prints what `llama-bench -o json` prints, and its arguments where they are seen."""
    bench, said = tmp_path / "llama-bench", tmp_path / "arguments"
    tests = [{"build_commit": "abc123", "model_type": "qwen2 1B BF16", "n_prompt": 20, "n_gen": 0, "avg_ts": 1234.56}]
    bench.write_text(f"#!/bin/sh\necho \"$@\" > {said}\necho '{json.dumps(tests)}'\n")
    bench.chmod(0o755)
    flags = ["--shape", "tiny", *RUNS["prefill"], "--llama-bench", str(bench), "--gguf", "model.gguf"]
    done = run("prefill", *flags)
    assert done.returncode == 0, done.stderr
    assert "llama.cpp abc123, qwen2 1B BF16, tokens/s: prompt of 20: 1,234.6." in done.stdout
    assert said.read_text().startswith("-m model.gguf ")
    assert "-o json -p 20 -n 0" in said.read_text()
    bench.write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    done = run("prefill", *flags)
    assert done.returncode == 2
    assert "no such model" in done.stderr.strip().splitlines()[-1]
