"""A fixture in BARC's format becomes tasks and solutions, once each, also when stopped on the way."""

import json

import pytest

import arc
import transform_dataset as script
from qwen_lab.errors import InputError
from transform_dataset import Config, main


def row(seed, pairs=4, side=3, form=list):
    grid = [[(seed + r + c) % 10 for c in range(side)] for r in range(side)]
    examples = [[[[seed % 10, index]], grid] for index in range(pairs)]
    return {"source": "def main(): pass", "seeds": [], "examples": [form(e) for e in examples]}


def as_objects(example):
    return {"input": example[0], "output": example[1]}


@pytest.fixture
def fixture(tmp_path):
    rows = [row(1), row(2, form=as_objects), row(1), row(3, pairs=2), row(4, side=31), {"other": 1}, row(5, pairs=9)]
    rows += [row(6), row(7)]
    lines = [json.dumps(one) for one in rows]
    lines.insert(7, "{broken")
    lines.insert(2, "")  # a blank line is no record
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_barc_rows_become_tasks(fixture, tmp_path, capsys):
    out = tmp_path / "out"
    main(Config(dataset=str(fixture), out=out))
    tasks = arc.load_tasks(out / "challenges.json")  # with solutions.json beside it
    assert [len(task.train) for task in tasks] == [3, 3, 4, 3, 3]
    assert all(len(task.test) == 1 and task.test[0].output is not None for task in tasks)
    assert [task.id for task in tasks] == [arc.data.content_id((*task.train, *task.test)) for task in tasks]
    shown = json.loads((out / "challenges.json").read_text())
    assert all("output" not in task["test"][0] for task in shown.values())
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["tasks"], summary["duplicates"], summary["skipped"]) == (5, 1, 4)
    assert summary["why"] == {
        "at least 3: 2 to train, 1 to test": 1, "1 to 30 rows and columns": 1, "a field 'examples'": 1, "JSON": 1,
    }  # fmt: skip
    assert not list(out.glob("*.part"))
    assert "5 tasks, 1 duplicates dropped, 4 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("every", [1, 2, 500])
@pytest.mark.parametrize("stop_after", range(9))
def test_a_stopped_run_goes_on_to_the_same_bytes(fixture, tmp_path, monkeypatch, every, stop_after):
    main(Config(dataset=str(fixture), out=tmp_path / "whole"))
    monkeypatch.setattr(script, "SAVE_EVERY", every)
    real, calls = script.as_task, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return real(*arguments)

    config = Config(dataset=str(fixture), out=tmp_path / "stopped")
    monkeypatch.setattr(script, "as_task", failing)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    monkeypatch.setattr(script, "as_task", real)
    main(config)
    for name in ("challenges.json", "solutions.json", "summary.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_max_samples_stops_early(fixture, tmp_path):
    main(Config(dataset=str(fixture), out=tmp_path / "out", max_samples=2, max_train_pairs=2))
    tasks = arc.load_tasks(tmp_path / "out" / "challenges.json")
    assert [len(task.train) for task in tasks] == [2, 2]


def test_another_config_is_refused(fixture, tmp_path, monkeypatch):
    config = Config(dataset=str(fixture), out=tmp_path / "out")
    main(config)
    with pytest.raises(InputError, match="found a finished run"):
        main(config)
    (tmp_path / "out" / "challenges.json").unlink()
    state = script.State({"dataset": "other"}, why={})
    (tmp_path / "out" / "state.json").write_text(json.dumps(script.asdict(state)))
    with pytest.raises(InputError, match="found a run with dataset='other'"):
        main(config)


def test_wrong_flags_and_sources(tmp_path):
    with pytest.raises(InputError, match="--max-train-pairs: found 1"):
        main(Config(dataset="x.jsonl", out=tmp_path / "a", max_train_pairs=1))
    with pytest.raises(arc.InputError, match=r"none\.jsonl: no such file"):
        main(Config(dataset=str(tmp_path / "none.jsonl"), out=tmp_path / "b"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"found no \.jsonl or \.parquet file"):
        main(Config(dataset=str(tmp_path / "empty"), out=tmp_path / "c"))
    with pytest.raises(arc.InputError, match="hub data set nobody/nothing: "):  # the suite is offline
        main(Config(dataset="nobody/nothing", out=tmp_path / "d"))
