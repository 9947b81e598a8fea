"""A run of solve_arc: every kill is survived, files are repaired or refused, wrong input is said, exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest

import extract
import running
import sae
from qwen_lab import predictions
from qwen_lab.errors import INPUT_ERRORS, InputError
from qwen_lab.stopping import Stopped
from solve_arc import Config, main
from solving import lines_of, made_task, run, small, write_tasks


@pytest.fixture
def source(tmp_path) -> str:
    return write_tasks(tmp_path)


@pytest.mark.parametrize(("how", "together"), [("greedy", 1), ("sampled", 2)])
def test_a_killed_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, how, together):
    flags = {"how": how, "capture": True, "tasks_together": together}
    whole = run(source, tmp_path / "whole", **flags)
    real = predictions.File.append
    for done in range(3):
        calls = []

        def dying(self, lines, calls=calls, done=done):
            if len(calls) == done:
                with open(self.path, "ab") as handle:  # a line cut in the middle
                    handle.write(json.dumps({**lines[0], "prediction": 0, "of": len(lines)}).encode()[:-9])
                raise KeyboardInterrupt
            calls.append(1)
            real(self, lines)

        out = tmp_path / f"killed{done}"
        monkeypatch.setattr(predictions.File, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, **flags)
        monkeypatch.setattr(predictions.File, "append", real)
        assert run(source, out, **flags) == whole


@pytest.mark.parametrize("later", [3, None])
def test_more_tasks_go_on_to_the_same_bytes(source, tmp_path, later):
    out, flags = tmp_path / "grown", {"capture": True, "items_per_shard": 4}  # the first task has 3 completions
    whole = run(source, tmp_path / "whole", limit=later, **flags)
    first = run(source, out, limit=1, **flags)
    shards = [name for name in first if "shards" in name]
    assert len(shards) == 2  # one, not full
    second = run(source, out, limit=2, **flags)
    assert second["predictions.jsonl"].startswith(first["predictions.jsonl"])
    kept = {name: (out / name).stat().st_mtime_ns for name in second if "shards/000000" in name}
    grown = run(source, out, limit=later, **flags)
    for name in whole:  # manifests too
        assert grown[name] == whole[name], name
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}
    with pytest.raises(InputError, match=f"--limit: found 2, expected at least {later or 'None'}") as caught:
        run(source, out, limit=2, **flags)
    assert "\n" not in str(caught.value)
    assert "max_prompt_tokens" in json.loads((out / "resume.json").read_text())  # --max-prompt, as it was called
    with pytest.raises(InputError, match="seed=0 there, 1 here"):
        run(source, out, limit=later, seed=1, **flags)


def test_more_of_other_tasks_are_refused(source, tmp_path):
    run(source, tmp_path / "out", limit=1)
    (Path(source) / "Z.json").write_text(json.dumps(made_task("Z").to_dict()))  # it sorts before the others
    with pytest.raises(InputError, match="tasks_digest="):
        run(source, tmp_path / "out", limit=2)


def test_damage_to_the_files_is_repaired_or_said(source, tmp_path):
    out = tmp_path / "out"
    whole = run(source, out, capture=True)
    path = out / "predictions.jsonl"
    path.write_bytes(whole["predictions.jsonl"][:-1])  # the last line end: its task is done again
    assert run(source, out, capture=True) == whole
    for name in ("000001.json", "000001.safetensors"):
        (out / "activations" / "shards" / name).unlink()
    assert run(source, out, capture=True) == whole  # from the first task with items in that shard on
    lines = whole["predictions.jsonl"].splitlines(keepends=True)
    path.write_bytes(b"".join(lines[3:]))
    with pytest.raises(InputError, match="line 1: found task 'b', expected line 0 of task a"):
        run(source, out, capture=True)


def test_captured_rows_are_those_of_extract(source, tmp_path):
    same = {"layers": "1,3", "max_new_tokens": 6, "encoder": "shape(minimal)", "prompt": "compact", "dtype": "float32"}
    extract.main(extract.Config(tasks=source, out=tmp_path / "extract", limit=2, items_per_shard=4, **same))
    main(small(source, tmp_path / "out", limit=2, predictions_per_task=1, capture=True, layers="1,3"))
    ours = sae.ActivationStore.open(tmp_path / "out" / "activations")
    theirs = sae.ActivationStore.open(tmp_path / "extract")
    assert ours.complete
    assert ours.sites == theirs.sites
    assert [item["text"] for item in ours.items.values()] == [item["text"] for item in theirs.items.values()]
    for name, column, expected in ((name, column, theirs.column(name)) for name, column in ours[:].columns.items()):
        if name == "activations":  # prompts of other lengths beside them: sums in another order
            np.testing.assert_allclose(column, expected, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(column, expected)


def test_prompts_that_do_not_fit_are_said_and_leave_the_rest(source, tmp_path):
    path = Path(source) / "b.json"
    big = json.loads(path.read_text())
    for pair in big["train"]:
        pair["input"] = [[0] * 20] * 20
    path.write_text(json.dumps(big))
    main(small(source, tmp_path / "out", max_prompt=250, capture=True))
    outcomes = {line["task"]: line for line in lines_of(tmp_path / "out")}
    assert outcomes["b"]["outcome"] == "prompt too long"
    assert "expected 250" in outcomes["b"]["detail"]
    assert outcomes["a"]["text"] is not None
    store = sae.ActivationStore.open(tmp_path / "out" / "activations")
    assert store.complete
    assert set(np.unique(store.column("item"))) == {0, 1, 2, 9, 10, 11}


BAD = [
    ({"predictions_per_task": 0}, "--predictions-per-task: found 0, expected at least 1"),
    ({"limit": 0}, "--limit: found 0"),
    ({"temperature": 0.0}, "--temperature: found 0.0, expected a number above 0"),
    ({"top_p": 1.5}, "--top-p: found 1.5, expected a probability"),
    ({"threshold": 0.0}, "--threshold: found 0.0, expected a probability"),
    ({"how": "threshold", "capture": True}, "--capture: found --how threshold"),
    ({"encoder": "shape("}, "encoder 'shape\\('"),
    ({"prompt": "poem"}, "prompt format: found 'poem'"),
    ({"tasks": "/no/such/tasks"}, "/no/such/tasks"),
    ({"layers": "9", "capture": True}, "--layers: found '9'"),
    ({"symmetries": False, "colours": False, "pair_order": False}, "count=3: expected 0 to 1"),
    ({"model": "/no/such/model"}, "/no/such/model"),
]


@pytest.mark.parametrize(("flags", "said"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_wrong_input_is_one_line(source, tmp_path, flags, said):
    with pytest.raises(INPUT_ERRORS, match=said) as caught:
        main(Config(**({"tasks": source, "out": tmp_path / "out", "predictions_per_task": 3} | flags)))
    assert "\n" not in str(caught.value)


def test_another_run_is_refused_with_the_differences(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    with pytest.raises(InputError, match="max_new_tokens=6 there, 7 here; seed=0 there, 3 here") as caught:
        run(source, out, seed=3, max_new_tokens=7)
    assert "\n" not in str(caught.value)
    (Path(source) / "c.json").write_text(json.dumps(made_task("z").to_dict()))
    with pytest.raises(InputError, match="tasks_digest="):
        run(source, out)
    (out / "resume.json").unlink()
    with pytest.raises(InputError, match=r"predictions\.jsonl without resume\.json"):
        run(source, out)


def test_a_signal_is_never_taken_for_wrong_input():
    assert not issubclass(Stopped, Exception)  # the tokenizer turns every Exception of its backend into InputError


def test_the_command_exits_as_promised(source, tmp_path):
    flags = ["--tasks", source, "--predictions-per-task", "1", "--max-new-tokens", "2", "--slots", "1", "--limit", "1"]
    done = running.run_experiment("solve_arc", *flags, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    wrong = running.run_experiment("solve_arc", *flags, "--out", str(tmp_path / "out"), "--slots", "0")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--slots: found 0" in wrong.stderr
