"""extract.py: from a command line to a store whose rows are what a plain pass computes."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import arc
import extract
import qwen_eqx
import running
import sae
import tolerances
from qwen_lab import corpora, errors, places, wording
from qwen_lab.extraction import Extraction
from qwen_lab.passages import Cursor, Segment

FLAGS = ("--limit", "2", "--max-new-tokens", "4", "--layers", "1,3", "--dtype", "float32", "--items-per-shard", "1")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("extract") / "store"
    done = running.run_experiment("extract", *FLAGS, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_rows_are_what_a_plain_pass_computes(extracted: tuple[Path, str]):
    store = sae.ActivationStore.open(extracted[0])
    store.verify()
    assert store.sites == ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
    items = [item for shard in store.shards for item in shard.items]
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
    asked = corpora.resolved(wording.filled(extract.Config(limit=2), tokenizer), model.config)
    wanted = [passage for _, passage in corpora.corpus(asked, tokenizer, 32_000).read([Segment(Cursor(0))])]
    assert [(item["task"], item["test"]) for item in items] == [(one.said["task"], one.said["test"]) for one in wanted]
    at = 0
    for number, item in enumerate(wanted):
        count = items[number]["prompt_tokens"] + items[number]["tokens"] - 1  # the last token is never read
        rows = store[at : at + count]
        at += count
        assert set(np.asarray(rows.item).tolist()) == {number}
        np.testing.assert_array_equal(rows.positions, np.arange(count))
        np.testing.assert_array_equal(rows.token_ids[: len(item.tokens)], item.tokens)
        np.testing.assert_array_equal(rows.generated, np.arange(count) >= len(item.tokens) - 1)
        room = -(-count // 512) * 512
        _, acts = running.forward(model, np.asarray(rows.token_ids).tolist(), list(store.sites), room=room)
        np.testing.assert_allclose(rows.activations.transpose(1, 0, 2), acts, **tolerances.LOGITS_F32)
    assert at == len(store)


def test_it_says_what_it_did_and_what_comes_next(extracted: tuple[Path, str]):
    out, said = extracted
    for part in (
        "random weights",
        "--model",
        " prompt, ",
        " generated tok/s",
        str(out),
        "next: python experiments/train_sae.py",
    ):
        assert part in said
    run = json.loads((out / "run.json").read_text())
    assert run["config"]["limit"] == 2
    assert run["config"]["seed"] == 0
    assert {"jax", "equinox"} <= run["versions"].keys()
    assert "git_revision" in run


def test_a_second_run_finds_all_done_and_another_config_is_refused(
    extracted: tuple[Path, str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    out = extracted[0]
    shards = contents(out / "shards")
    monkeypatch.setattr(Extraction, "generate", lambda *_: pytest.fail("a committed shard was made again"))
    same = extract.Config(limit=2, max_new_tokens=4, layers="1,3", dtype="float32", items_per_shard=1, out=out)
    extract.main(same)
    assert contents(out / "shards") == shards
    before = contents(out)
    other = extract.Config(limit=2, max_new_tokens=5, layers="1,3", dtype="float32", items_per_shard=1, out=out)
    with pytest.raises(sae.InputError, match="max_new_tokens") as caught:
        extract.main(other)
    assert "\n" not in str(caught.value)
    assert contents(out) == before


def test_a_shard_that_is_missing_is_made_again_byte_for_byte(extracted: tuple[Path, str], tmp_path: Path):
    out, again = extracted[0], tmp_path / "store"
    (again / "shards").mkdir(parents=True)
    for name, data in contents(out).items():
        if not name.startswith("shards/000001"):
            (again / name).write_bytes(data)
    done = running.run_experiment("extract", *FLAGS, "--out", str(again))
    assert done.returncode == 0, done.stderr
    assert contents(again / "shards") == contents(out / "shards")


@pytest.mark.parametrize("per_shard", [1, 2])
def test_more_tasks_are_added_to_what_stands(per_shard: int, tmp_path: Path):
    """The store is that of a run that was given all of them at once; whole shards are not written again."""
    tasks = running.short_tasks(tmp_path, 3)
    same = {"tasks": tasks, "max_new_tokens": 4, "layers": "1,3", "items_per_shard": per_shard, "batch_size": 2}
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    extract.main(extract.Config(limit=1, out=grown, **same))
    first = contents(grown / "shards")
    written = {name: (grown / "shards" / name).stat().st_mtime_ns for name in first}
    extract.main(extract.Config(limit=3, out=grown, **same))
    extract.main(extract.Config(limit=3, out=whole, **same))
    ours, theirs = contents(grown), contents(whole)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"run.json", "manifest.json", "metrics.jsonl"}:
        assert ours[name] == theirs[name], name
    if per_shard == 1:
        assert all((grown / "shards" / name).stat().st_mtime_ns == at for name, at in written.items())
    config = extract.Config(limit=2, out=grown, **same)
    with pytest.raises(errors.InputError, match="--limit: found 2, expected at least 3, as the run in") as caught:
        extract.main(config)
    assert "\n" not in str(caught.value)
    assert contents(grown) == ours


def test_more_of_other_tasks_are_refused(tmp_path: Path):
    tasks = sorted(arc.load_tasks(running.short_tasks(tmp_path)), key=lambda task: task.id)
    source = tmp_path / "tasks"
    source.mkdir()
    config = extract.Config(tasks=str(source), limit=1, max_new_tokens=2, out=tmp_path / "out")
    (source / f"{tasks[1].id}.json").write_text(json.dumps(tasks[1].to_dict()))
    extract.main(config)
    (source / f"{tasks[0].id}.json").write_text(json.dumps(tasks[0].to_dict()))  # it sorts before the other
    before = contents(tmp_path / "out")
    with pytest.raises(errors.InputError, match=f"--tasks: found task {tasks[0].id}.*expected task {tasks[1].id}"):
        extract.main(dataclasses.replace(config, limit=2))
    assert contents(tmp_path / "out") == before


BAD = {
    "layers": {"layers": "9"}, "layers as words": {"layers": "first"}, "no limit": {"limit": 0},
    "tasks": {"tasks": "arc-agi-9/training"}, "model": {"model": "./no-such-model"}, "encoder": {"encoder": "nothing"},
    "prompt": {"prompt": "nothing"}, "batch size": {"batch_size": -1}, "new tokens": {"max_new_tokens": 0},
    "shards": {"items_per_shard": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_one_line_and_nothing_is_written(name: str, tmp_path: Path):
    with pytest.raises(errors.INPUT_ERRORS) as caught:
        extract.main(extract.Config(**({"limit": 1} | BAD[name] | {"out": tmp_path / "store"})))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_out_is_a_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(errors.INPUT_ERRORS):
        extract.main(extract.Config(limit=1, out=path))
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "environment", "part"),
    [(("--layers", "7:3"), {}, "--layers"), ((), {"JAX_PLATFORMS": "nonsense"}, "JAX_PLATFORMS=nonsense")],
)
def test_the_process_ends_with_2_and_one_line(flags, environment, part: str, tmp_path: Path):
    done = running.run_experiment("extract", *flags, "--out", str(tmp_path / "store"), **environment)
    assert done.returncode == 2
    assert part in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


LAYERS = {
    "all": [0, 1, 2, 3],
    "late": [2, 3],
    "1:3": [1, 2],
    ":2": [0, 1],
    "2:": [2, 3],
    "3,0": [3, 0],
    " 1 , 2": [1, 2],
}


@pytest.mark.parametrize("text", LAYERS)
def test_layers_are_read(text: str):
    assert places.parse_layers(text, 4) == LAYERS[text]


@pytest.mark.parametrize("text", ["", "4", "0:5", "3:1", "-1", "1:2:3", "a", "0,,1", "0,4"])
def test_layers_that_do_not_exist(text: str):
    with pytest.raises(errors.InputError, match="--layers") as caught:
        places.parse_layers(text, 4)
    assert "\n" not in str(caught.value)


def test_late_is_the_last_three_fifths():
    assert places.parse_layers("late", 24) == list(range(10, 24))
    assert places.parse_layers("late", 1) == [0]
