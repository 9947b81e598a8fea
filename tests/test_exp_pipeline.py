"""pipeline.py: from a data set to a page; whole stages are skipped, cut ones go on, and its file of flags repeats it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

import evaluate_sae
import pipeline
import transform_dataset
from edge import at_edge, refused
from qwen_lab import InputError, RunConfig, flags, recipes, stages
from running import ROOT, SMALL_STAGES, run

RECIPE = """
[transform]
dataset = "{data}"

[extract]
limit = 3
max-new-tokens = 2
batch_size = 2
items-per-shard = 1
layers = [2, 3]

[train]
held-out = 1
d-sae = 32
k = 4
steps = 4
batch-size = 32
steps-per-call = 2
buffer-rows = 8192

[evaluate]
limit = 1
max-prompt = 512
answered = 0
augmented = 0
"""
DICTIONARY = "train/sae/sae_weights.safetensors"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A file of flags, and the data set that it names."""
    where = tmp_path_factory.mktemp("data")
    rows = [[[[[colour, 1]], [[1, colour]]] for colour in (first, 2, 3, 4)] for first in (5, 6, 7)]
    (where / "rows.jsonl").write_text("".join(json.dumps({"examples": pairs}) + "\n" for pairs in rows))
    (where / "my.toml").write_text(RECIPE.format(data=where / "rows.jsonl"))
    return where / "my.toml"


def told(recipe: Path, out: Path, *words: str) -> pipeline.Config:
    return flags.parse(pipeline.Config, None, ["--config", str(recipe), "--out", str(out), *words])


@pytest.fixture(scope="module")
def made(recipe: Path, tmp_path_factory) -> Path:
    """A whole run."""
    out = tmp_path_factory.mktemp("made")
    said = run(pipeline, told(recipe, out))
    assert "next: open" in said
    return out


def tree(out: Path) -> dict[str, bytes]:
    """What a run makes, but for what says when and how long."""
    kept = (
        "extract/shards/*.safetensors",
        "transform/*ns.json",
        "transform/challenges.json",
        DICTIONARY,
        "*/metrics.json",
    )
    return {str(path.relative_to(out)): path.read_bytes() for each in kept for path in out.glob(each)}


# ---------------------------------------------------------------- the page


class Reader(HTMLParser):
    """Names of elements and the values of attributes that lead somewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        assert not [name for name, _ in attrs if name.startswith("on")]


def test_the_page_links_everything_and_fetches_nothing(made: Path):
    text = (made / "index.html").read_text()
    page = Reader(text)
    assert not page.names & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert "default-src 'none'" in text
    inside = [link for link in page.links if not link.startswith(("#", "data:image/svg+xml;base64,"))]
    assert all((made / unquote(link)).exists() for link in inside)
    expected = {
        "transform/challenges.json",
        "extract/shards",
        "train/sae",
        "evaluate/features/index.html",
        "pipeline.toml",
    }
    assert expected <= set(inside)
    scores = json.loads((made / "evaluate" / "metrics.json").read_text())["sae"]
    assert f">{scores['fvu']:.3g}<" in text
    assert f">{scores['ce_recovered']:.3f}<" in text
    assert "<dt>tasks</dt><dd>3</dd>" in text
    assert "blocks.2.hook_resid_post, blocks.3.hook_resid_post, 64 wide" in text


def test_names_from_outside_are_escaped(tmp_path: Path):
    bad = "<script>alert(1)</script>"
    (tmp_path / "train" / f"javascript:{bad.replace('/', '')}").mkdir(parents=True)
    row = {"form": bad, "rows_of": bad, "fvu": 0.5}
    (tmp_path / "train" / "metrics.json").write_text(json.dumps({bad: row}))
    (tmp_path / "train" / "loss.svg").write_text(bad)
    shown = pipeline.pipeline_report.section("train", bad, tmp_path / "train")
    text = pipeline.pipeline_report.page(tmp_path, bad, {bad: bad}, [shown], bad)
    assert not Reader(text).names & {"script"}
    assert not [link for link in Reader(text).links if link.startswith("javascript:")]


# ---------------------------------------------------------------- stages


def test_what_is_whole_is_skipped_and_said(recipe: Path, made: Path):
    before = {path: path.stat().st_mtime_ns for path in made.glob("*/**/*") if path.is_file()}
    said = run(pipeline, told(recipe, made))
    assert said.count(": whole, skipped") == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_file_beside_the_results_repeats_them_elsewhere(made: Path, tmp_path: Path):
    out = tmp_path / "again"
    run(pipeline, told(made / "pipeline.toml", out))
    ours = {name: data.replace(str(out).encode(), str(made).encode()) for name, data in tree(out).items()}
    assert ours == tree(made)
    assert (out / "pipeline.toml").read_text().replace(str(out), str(made)) == (made / "pipeline.toml").read_text()


def test_a_stage_is_made_again_when_what_it_depends_on_changed(recipe: Path, made: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    shutil.rmtree(out / "train")  # of another directory: its store was named otherwise
    assert run(pipeline, told(recipe, out)).count(": whole, skipped") == 3
    said = run(pipeline, told(recipe, out, "--evaluate.examples", "3", "--train.track", "none"))
    assert said.count(": whole, skipped") == 3
    said = run(pipeline, told(recipe, out, "--train.steps", "6"))
    assert said.count(": whole, skipped") == 2
    assert "going on from step 4 of 6" in said
    (out / "evaluate" / "metrics.json").unlink()
    said = run(pipeline, told(recipe, out, "--train.steps", "6", "--stages", "evaluate", "report"))
    assert said.count(": whole, skipped") == 0
    assert said.count(": left out of --stages") == 3
    with pytest.raises(InputError, match="found a finished run"):
        run(pipeline, told(recipe, out, "--transform.max-samples", "2"))
    assert "steps = 6" in (out / "pipeline.toml").read_text()


def test_a_dictionary_does_not_go_on_with_other_activations(recipe: Path, tmp_path: Path):
    words = ("--stages", "transform", "extract", "train")
    run(pipeline, told(recipe, tmp_path, *words, "--extract.limit", "2"))
    with pytest.raises(InputError, match=r"train: found a dictionary trained on what extract wrote with other flags"):
        run(pipeline, told(recipe, tmp_path, *words, "--extract.limit", "3"))
    assert "going on from step 4 of 6" in run(
        pipeline, told(recipe, tmp_path, *words, "--extract.limit", "3", "--train.steps", "6")
    )


class Killed(BaseException):
    """What stands for a kill: nothing catches it."""


def test_a_run_killed_before_any_stage_is_marked_goes_on(recipe: Path, made: Path, tmp_path: Path, monkeypatch):
    """A mark at the beginning and at the end of each of four stages: killed where a stage has just ended, each in turn."""
    real, config = stages.Marks.set, told(recipe, tmp_path / "out")

    for last in pipeline.COMMANDS:

        def failing(self, name: str, basis: stages.Basis, done: bool, seconds: float, last: str = last) -> None:
            if done and name == last:
                raise Killed
            real(self, name, basis, done, seconds)

        with monkeypatch.context() as patch:
            patch.setattr(stages.Marks, "set", failing)
            with pytest.raises(Killed):
                run(pipeline, config)
    assert run(pipeline, config).count(": whole, skipped") == 3
    ours, theirs = tree(tmp_path / "out"), tree(made)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in theirs if not name.endswith("metrics.json"))


def test_a_run_killed_from_outside_goes_on(recipe: Path, made: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = [str(ROOT / "tests" / "kill_at.py"), "SIGKILL", "sae.training.checkpoint", "save", "pipeline"]
    done = subprocess.run(
        [sys.executable, *words, "--config", str(recipe), "--out", str(out)],
        capture_output=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == -signal.SIGKILL
    run(pipeline, told(recipe, out))
    ours, theirs = tree(out), tree(made)
    assert all(ours[name] == theirs[name] for name in theirs if not name.endswith("metrics.json"))


def test_a_finished_data_set_is_never_begun_again_by_a_kill_while_it_finishes(
    recipe: Path, tmp_path: Path, monkeypatch
):
    config = told(recipe, tmp_path).transform
    config = dataclasses.replace(config, out=tmp_path / "whole", max_samples=2)
    transform_dataset.main(config)
    for name in ("summary.json", "run.json"):
        out = tmp_path / name
        again = dataclasses.replace(config, out=out)
        real = transform_dataset.files.write_text
        monkeypatch.setattr(transform_dataset, "SAVE_EVERY", 1)

        def failing(path: Path, text: str, name: str = name, real: Any = real) -> None:
            if path.name == name:
                raise Killed
            real(path, text)

        with monkeypatch.context() as patch:
            patch.setattr(transform_dataset.files, "write_text", failing)
            with pytest.raises(Killed):
                transform_dataset.main(again)
        transform_dataset.main(again)
        for part in ("challenges.json", "solutions.json", "summary.json"):
            assert (out / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()


def test_an_error_says_which_stage_it_is_of(tmp_path: Path):
    words = [*SMALL_STAGES.replace("--train.held-out 1", "--train.held-out 3").split(), "--out", str(tmp_path / "out")]
    code, said = at_edge("pipeline", *words)
    assert code == 2
    assert said.startswith("error: --train.held-out: found 3, expected"), said
    assert (tmp_path / "out" / "pipeline.toml").exists()


# ---------------------------------------------------------------- the file

WRONG = {
    "[train]\nsteps = 'x'": "[train] steps: found 'x', expected a whole number",
    "[train]\nsteps = 0": "[train] steps: found 0, expected at least 1",
    "[train]\nsteps = true": "[train] steps: found 'true', expected a whole number",
    "[train]\nstepz = 3": "[train] stepz: found no such flag, expected one that --help names (such as steps)",
    "[train]\nlr = {a = 1}": "[train] lr: found a table, expected text, a number or a list of them",
    "[train]\nlr = 2026-01-01": "[train] lr: found datetime.date(2026, 1, 1), expected text, a number or a list of them",
    "[train]\nform = 'x'": "[train] form: found 'x', expected one of 'relu', 'topk', ",
    "[extract]\nsites = ['--a']": "[extract] sites: found '--a', expected text, a number or a list of them",
    "[trian]\nsteps = 3": "trian: found a table, expected one of the tables transform, extract, train, evaluate, or flags",
    "train = 3": "train: found 3, expected one of the tables transform, extract, train, evaluate, or flags before",
    "steps = 3": "steps: found no such flag, expected one that --help names",
    "stages = ['x']": "--stages: found x, expected of transform, extract, train, evaluate, report",
    "config = 'other.toml'": "config: found other.toml, expected none: a file names no other",
    "[train": "found no TOML (Expected ']' at the end of a table declaration",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_a_file_is_one_line(text: str, tmp_path: Path):
    (tmp_path / "my.toml").write_text(text)
    said = refused("pipeline", "--config", str(tmp_path / "my.toml"), "--out", str(tmp_path / "out"))
    assert WRONG[text] in said
    assert "--stages" in said or f"error: {tmp_path / 'my.toml'}: " in said
    assert not (tmp_path / "out").exists()


def test_the_command_line_wins_over_the_file(recipe: Path, tmp_path: Path):
    config = told(recipe, tmp_path, "--train.steps", "7", "--train.sweep", "k=2", "4", "--extract.limit=None")
    assert (config.train.steps, config.train.k, config.train.sweep) == (7, 4, ("k=2,4",))
    assert (config.extract.limit, config.extract.batch_size, config.extract.layers) == (None, 2, "2,3")
    assert (config.train.source, config.out) == ("store", tmp_path)
    assert told(recipe, tmp_path) == flags.parse(pipeline.Config, None, [f"--config={recipe}", f"--out={tmp_path}"])


@dataclasses.dataclass(frozen=True)
class Inner:
    """A table."""

    text: str = "a"
    number: int = 0
    share: float = 0.0
    maybe: int | None = None
    several: flags.Words = ()
    yes: bool = False
    place: Path = Path("a")
    chosen: Literal["b", "c"] = "b"


@dataclasses.dataclass(frozen=True)
class Outer:
    """All of it."""

    number: int = 0
    first: Inner = Inner()
    second: Inner = Inner()


WORDS = st.text(string.printable.replace(",", "") + "äß→\x7f", min_size=1, max_size=8).filter(
    lambda text: text == text.strip() and not text.startswith("-") and text != "None"
)
INNER = st.builds(
    Inner, text=WORDS, number=st.integers(-9, 9), share=st.floats(allow_nan=False), maybe=st.none() | st.integers(),
    several=st.lists(WORDS, max_size=3).map(tuple), yes=st.booleans(), place=WORDS.map(Path),
    chosen=st.sampled_from(["b", "c"]),
)  # fmt: skip


@given(st.builds(Outer, number=st.integers(), first=INNER, second=INNER))
def test_a_file_that_is_written_is_read_as_the_same_config(config: Outer):
    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "a.toml"
        path.write_bytes(recipes.written(config, ["a heading"]).encode())
        assert recipes.read(path, Outer()) == config


def test_directories_of_stages_follow_where_they_are_put():
    config = pipeline.Config()
    tables = {
        "extract": dataclasses.replace(config.extract, out=Path("far/away")),
        "train": config.train,
        "evaluate": evaluate_sae.Config(sae=("OUT/train/sae", "OUT/other", "x/OUT"), out=Path("OUT/evaluate")),
    }
    filled = stages.resolved(tables, Path("runs/a"))
    assert filled["train"].store == Path("far/away")
    assert filled["train"].out == Path("runs/a/train")
    assert filled["evaluate"].sae == ("runs/a/train/sae", "OUT/other", "x/OUT")
    assert filled["extract"].out == Path("far/away")


def test_a_foreign_file_of_marks_is_refused(recipe: Path, tmp_path: Path):
    for text in ('{"train": 3}', "[]", '{"train": {"basis": {}, "done": true, "seconds": 1}}'):
        (tmp_path / stages.FILE).write_text(text)
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / stages.FILE}: found another file")):
            run(pipeline, told(recipe, tmp_path))


def test_every_stage_runs_without_flags_of_its_own():
    assert pipeline.Config().train == dataclasses.replace(
        RunConfig(), source="store", store=Path("OUT/extract"), out=Path("OUT/train")
    )
