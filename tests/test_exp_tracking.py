"""metrics.jsonl and trackers: the same numbers, one run for what goes on, and no tracker that fails ends a run."""

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_lm
import train_sae
from edge import refused
from qwen_lab import InputError, stopping, tracking
from qwen_lab.lm_settings import LMConfig
from running import run, small

LM = LMConfig(
    blocks=1, d_model=16, heads=2, kv_heads=1, d_ff=16, steps=4, batch_size=2, steps_per_call=2, sides=(3, 4),
    context_length=260, families=("mirror",), held_out_families=("frame",), encoder="padded(4)", eval_tasks=1,
    workers=0, warmup=2,
)  # fmt: skip


class Fake(types.ModuleType):
    """A tracker; `fails` names the call that does."""

    def __init__(self, name: str, fails: str = "", error: BaseException | None = None):
        super().__init__(name)
        self.fails, self.error = fails, error or ConnectionError("no\nroute")
        self.begun: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> "Fake":
        self.called("init")
        self.begun.append(options)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.called("log")
        self.lines.append((step, numbers))

    def finish(self) -> None:
        self.called("finish")
        self.finished += 1

    def called(self, name: str) -> None:
        if name == self.fails:
            raise self.error


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(**{"name": "trackio"} | getattr(request, "param", {}))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / tracking.METRICS).read_text().splitlines()]


@pytest.mark.parametrize("fake", [{"name": "trackio"}, {"name": "wandb"}], indirect=True)
def test_the_tracker_gets_the_numbers_of_the_file(fake: Fake, tmp_path: Path):
    track: Any = fake.__name__
    run(train_sae, small(tmp_path / "sae", track=track, sweep=("k=2,4",)))
    run(train_lm, LMConfig(**vars(LM) | {"track": track, "out": tmp_path / "lm"}))
    (first, second), taken = fake.begun, iter(fake.lines)
    assert fake.finished == 2
    assert first["config"]["d_sae"] == 64
    assert second["config"]["blocks"] == 1
    assert ("id" in first) == (track == "wandb")
    for line in lines_of(tmp_path / "sae"):
        step, numbers = next(taken)
        assert step == line["step"]
        assert {name: numbers[f"{name}/k2"] for name in ("loss", "fvu")} == {n: line[n][0] for n in ("loss", "fvu")}
    for line in lines_of(tmp_path / "lm"):
        step, numbers = next(taken)
        assert step == line["step"]
        assert {f"families/{name}" for name in line.get("families", ())} <= numbers.keys()
        assert numbers.get("loss") == line.get("loss")
    assert next(taken, None) is None


def test_a_run_that_goes_on_is_the_same_run_and_a_new_one_another(fake: Fake, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_sae.Run, "_due", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(stopping.Stopped):
            run(train_sae, small(tmp_path / "a", track="trackio"))
    assert fake.finished == 1
    run(train_sae, small(tmp_path / "a", track="trackio"))
    run(train_sae, small(tmp_path / "b", track="trackio"))
    first, again, other = (each["name"] for each in fake.begun)
    assert first == again != other
    assert [step for step, _ in fake.lines] == [2, 4, 6, 8] * 2
    assert [line["step"] for line in lines_of(tmp_path / "a")] == [2, 4, 6, 8]


FAILS = [(fails, error) for fails in ("init", "log", "finish") for error in (None, SystemExit(3))]


@pytest.mark.parametrize("fake", [{"fails": fails, "error": error} for fails, error in FAILS], indirect=True)
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(fake: Fake, tmp_path: Path):
    said = run(train_sae, small(tmp_path, track="trackio", steps=4))
    assert said.count("--track trackio failed (") == 1
    assert "; the run goes on without it\n" in said
    assert len(lines_of(tmp_path)) == 2
    assert (tmp_path / "sae" / "cfg.json").exists()


@pytest.mark.parametrize("command", ["train_sae", "train_lm"])
def test_one_that_is_not_there_is_one_line_before_anything(command: str, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    said = refused(command, "--track", "trackio", "--out", str(tmp_path / "out"))
    assert said == "error: --track: found no trackio here, expected it installed: pip install 'qwen-eqx[track]'\n"
    (tmp_path / "wandb.py").write_text("raise OSError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    said = refused(command, "--track", "wandb", "--out", str(tmp_path / "out"))
    assert "found wandb, which cannot be imported (OSError: broken), expected it installed: pip install wandb" in said
    assert not (tmp_path / "out").exists()


NUMBERS = st.integers(-9, 9) | st.floats(allow_nan=False)
NAMES = st.text("abc", min_size=1, max_size=3)


@given(st.dictionaries(NAMES, NUMBERS | st.lists(NUMBERS, max_size=3) | st.dictionaries(NAMES, NUMBERS, max_size=3)))
def test_every_number_of_a_line_has_one_name(line: dict[str, Any]):
    found = tracking.flat(line)
    count = {list: len, dict: len}
    assert len(found) == sum(count.get(type(value), lambda _: 1)(value) for value in line.values())
    for name, value in found.items():
        first, _, inner = name.partition("/")
        held = line[first]
        assert value == (held if not inner else held[int(inner)] if isinstance(held, list) else held[inner]) or (
            isinstance(held, list) and held == [value]
        )


def test_what_is_no_number_is_left_out():
    assert tracking.flat({"a": None, "b": "text", "c": True, "d": {"e": None, "f": 1}}) == {"d/f": 1}
    assert tracking.flat({"fvu": [1.0, 2.0], "l0": [3.0]}, ["k2", "k4"]) == {"fvu/k2": 1.0, "fvu/k4": 2.0, "l0": 3.0}


def test_without_a_history_the_lines_that_stand_are_kept(tmp_path: Path):
    for step in range(2):
        with tracking.Log(tmp_path, "none", None) as log:
            log.add({"step": step})
    with (tmp_path / tracking.METRICS).open("a") as file:
        file.write('{"step": ')  # a kill inside a write
    with tracking.Log(tmp_path, "none", None) as log:
        log.add({"step": 2})
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2]
    with tracking.Log(tmp_path, "none", None, [{"step": 0}]):
        pass
    assert lines_of(tmp_path) == [{"step": 0}]


def test_a_foreign_name_is_refused(fake: Fake, tmp_path: Path):
    (tmp_path / tracking.NAME).write_text("[]")
    with pytest.raises(InputError, match="found another file, expected the tracker's name"):
        tracking.Log(tmp_path, "trackio", LM, [{"step": 1}])


def test_trackio_itself_takes_them_without_a_network(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    pytest.importorskip("trackio")
    for history, steps in ([], (1, 2)), ([{"step": 1}, {"step": 2}], (3,)):
        with tracking.Log(tmp_path, "trackio", LM, history) as log:
            for step in steps:
                log.add({"step": step, "loss": 1 / step, "families": {"mirror": 0.5, "frame": None}})
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((tmp_path / tracking.NAME).read_text())["run"]
    kept = SQLiteStorage.get_logs(tracking.PROJECT, name)
    assert [(line["step"], line["loss"], line["families/mirror"]) for line in kept] == [
        (1, 1.0, 0.5),
        (2, 0.5, 0.5),
        (3, 1 / 3, 0.5),
    ]
