"""train_lm.py: tasks in an order that seed and step alone fix, runs stopped and resumed, models that others open."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arc
import qwen_eqx
import train_lm
from qwen_eqx.training import Batch
from qwen_lab import cards, exactness, files, lessons, lm_runs, stopping
from qwen_lab.errors import InputError, RunError
from qwen_lab.lm_settings import LMConfig, course
from running import run
from sae.training import checkpoint

SMALL = LMConfig(
    blocks=1, d_model=16, heads=2, kv_heads=1, d_ff=16, steps=8, batch_size=3, steps_per_call=2, sides=(3, 4),
    context_length=260, families=("mirror", "gravity", "scale"), held_out_families=("frame",), encoder="padded(4)",
    eval_every=4, eval_tasks=2, checkpoint_every=4, workers=0, warmup=2,
)  # fmt: skip


def small(out: Path, **fields: Any) -> LMConfig:
    return dataclasses.replace(SMALL, out=out, **fields)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short run."""
    out = tmp_path_factory.mktemp("lm")
    said = run(train_lm, small(out))
    assert "3 families" in said
    assert "frame  (never trained on)" in said
    return out


def weights(out: Path) -> bytes:
    return (out / lm_runs.MODEL / "model.safetensors").read_bytes()


def test_a_model_directory_comes_out_with_its_history(trained: Path):
    model, tokenizer = qwen_eqx.from_pretrained(trained / lm_runs.MODEL, dtype=jnp.float32)
    assert (model.config.layers, model.config.d_model) == (1, 16)
    assert tokenizer.encode("0_\n") == qwen_eqx.from_pretrained("tiny-random")[1].encode("0_\n")
    lines = [json.loads(line) for line in (trained / lm_runs.METRICS).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    measured = [line for line in lines if "families" in line]
    assert [line["step"] for line in measured] == [4, 8]
    assert set(measured[0]["families"]) == {"mirror", "gravity", "scale", "frame"}
    card = (trained / lm_runs.MODEL / "README.md").read_text()
    assert hashlib.sha256(weights(trained)).hexdigest() in card
    assert "| frame, never trained on | " in card
    assert (trained / "loss.svg").read_text().startswith("<?xml")


def test_the_same_seed_gives_the_same_weights_and_another_one_others(trained: Path, tmp_path: Path):
    run(train_lm, small(tmp_path / "again", steps_per_call=3, workers=1))
    assert weights(tmp_path / "again") == weights(trained)
    run(train_lm, small(tmp_path / "other", seed=1))
    assert weights(tmp_path / "other") != weights(trained)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(trained: Path, tmp_path: Path, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(lm_runs.LMRun, "_due", lambda _, every, taken: every == 5 and os.kill(os.getpid(), number))
        with pytest.raises((stopping.Stopped, KeyboardInterrupt)):
            run(train_lm, small(tmp_path, eval_every=5))
    [step] = checkpoint.steps(tmp_path / "checkpoints")
    assert step in (1, 2)  # one call: its second step shares it if it is as wide
    assert f"{step} steps, {3 * step} tasks" in (tmp_path / lm_runs.MODEL / "README.md").read_text()
    assert f"going on from step {step} of 8" in run(train_lm, small(tmp_path))
    assert weights(tmp_path) == weights(trained)
    whole = [json.loads(line)["step"] for line in (tmp_path / lm_runs.METRICS).read_text().splitlines()]
    assert whole == sorted(whole)


def test_a_changed_flag_is_refused_with_the_difference(trained: Path):
    before = weights(trained)
    with pytest.raises(InputError, match=r"lr was 0.002 and is 0.001\), expected the same config or a new directory"):
        run(train_lm, small(trained, lr=1e-3))
    assert weights(trained) == before


def test_a_damaged_history_is_refused(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "copy")
    note = tmp_path / "copy" / "checkpoints" / "00000008" / "state.json"
    note.write_text(note.read_text().replace('"seed": 0', '"seed": 3'))
    with pytest.raises(InputError, match="cursor: found other values than were saved"):
        run(train_lm, small(tmp_path / "copy"))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch):
    window = lessons.Teacher.window

    def spoiled(self, number: int, size: tuple[int, int]):
        given = window(self, number, size)
        given[4].weights[:] = np.inf
        return given

    monkeypatch.setattr(lessons.Teacher, "window", spoiled)
    with pytest.raises(RunError, match=r"step 4: the loss or its gradient is not finite.*checkpoint of step 4 is kept"):
        run(train_lm, small(tmp_path))
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]


def test_fine_tuning_by_lora_goes_on_from_a_model_and_is_merged(trained: Path, tmp_path: Path):
    first = str(trained / lm_runs.MODEL)
    run(train_lm, small(tmp_path, init=first, lora_rank=2, steps=2))
    before, after = (qwen_eqx.from_pretrained(path)[0] for path in (first, tmp_path / lm_runs.MODEL))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    stages = json.loads((tmp_path / lm_runs.MODEL / cards.STAGES).read_text())["stages"]
    assert [stage["steps"] for stage in stages] == [8, 2]
    assert "--lora-rank 2" in stages[1]["command"]
    assert "30 tasks, each seen once" in (tmp_path / lm_runs.MODEL / cards.CARD).read_text()
    assert (before.blocks[0].attn_norm.weight == after.blocks[0].attn_norm.weight).all()
    assert (before.blocks[0].attn.q.weight != after.blocks[0].attn.q.weight).any()


def test_a_model_that_tells_its_stages_wrongly_is_refused(trained: Path, tmp_path: Path):
    shutil.copytree(trained / lm_runs.MODEL, tmp_path / "model")
    told = tmp_path / "model" / cards.STAGES
    for said in ({"stages": [3]}, {"stages": [{"command": 1}]}, {"stages": {}}, []):
        told.write_text(json.dumps(said))
        with pytest.raises(ValueError, match=cards.STAGES):
            run(train_lm, small(tmp_path / "out", init=str(tmp_path / "model"), steps=1))


# ---------------------------------------------------------------- tasks of a data set


def data_set(path: Path, colour: int = 3) -> str:
    """Two tasks: a small one with two answered test inputs and one without an answer, and one that fits no context."""

    def grid(*numbers: int) -> list[list[int]]:
        return [[numbers[0], 1, 2], [0, *numbers[1:]]]

    def pair(*numbers: int) -> dict[str, Any]:
        return {"input": grid(*numbers), "output": grid(*numbers)[::-1]}

    small = {
        "train": [pair(4, 4, 5), pair(6, colour, 5), pair(7, 8, 8)],
        "test": [pair(1, 2, 3), {"input": grid(1, 1, 1)}, pair(3, 0, 4)],
    }
    wide = {"input": [[1] * 30] * 30, "output": [[2] * 30] * 30}
    path.mkdir(exist_ok=True)
    (path / "small.json").write_text(json.dumps(small))
    (path / "wide.json").write_text(json.dumps({"train": [wide, wide], "test": [wide]}))
    return str(path)


def unaugmented(task: arc.Task, number_of_pairs: int) -> set[str]:
    """A task under every symmetry and order of pairs, its colours in the order of their first appearance."""
    found = set()
    for symmetry in arc.augment.SYMMETRIES:
        for order in itertools.permutations(range(number_of_pairs)):
            view = arc.augment.Augmentation(symmetry, order=order).apply(task)
            cells = np.concatenate([np.ravel(g) for p in (*view.train, *view.test) for g in (p.input, p.output)])
            names = {0: 0} | {c: n for n, c in enumerate(dict.fromkeys(cells[cells > 0].tolist()), 1)}
            shapes = [np.shape(p.input) for p in (*view.train, *view.test)]
            found.add(f"{shapes} {[names[c] for c in cells.tolist()]}")
    return found


def test_a_share_of_the_documents_is_of_a_data_set_augmented_afresh(tmp_path: Path):
    """The others are those of the same numbers without it."""
    plain = course(SMALL)
    both = dataclasses.replace(plain, tasks=data_set(tmp_path), tasks_share=0.5)
    teacher = lessons.Teacher(both, TEACHER.tokenizer)
    assert (len(teacher.fitting), teacher.offered) == (2, 3)
    drawn = [(teacher.task(n), TEACHER.task(n)) for n in range(200)]
    real = [task for task, other in drawn if task != other]
    assert {task.id for task in real} == {"small"}
    assert 75 < len(real) < 125
    assert len({str(task.to_dict()) for task in real}) > 0.9 * len(real)
    given = [unaugmented(task, 3) for task in teacher.fitting]
    seen = [unaugmented(task, 3) for task in real[:20]]
    assert all(any(one == known for known in given) for one in seen)
    assert all(known in seen for known in given)
    again = lessons.Teacher(both, TEACHER.tokenizer)
    assert [again.task(n) for n in (7, 3)] == [drawn[n][0] for n in (7, 3)]


def test_batches_with_a_data_set_depend_on_seed_and_step_alone(tmp_path: Path):
    both = dataclasses.replace(course(SMALL), tasks=data_set(tmp_path), tasks_share=0.5)

    def made(step: int, workers: int) -> list[bytes]:
        calls = lessons.batches(both, step, 10, (1, 3), 2, workers)
        return [np.asarray(rows).tobytes() for call in calls for rows in call.tokens]

    whole = made(0, 0)
    assert made(5, 1) == whole[5:]


def test_a_run_on_a_data_set_says_so_and_resumes_on_the_same_tasks_alone(tmp_path: Path):
    fields: dict[str, Any] = {"tasks": data_set(tmp_path / "data"), "tasks_share": 0.5}
    said = run(train_lm, small(tmp_path / "run", **fields))
    assert "50% of the documents from" in said
    assert "2 of its 3 test inputs fit 260 tokens" in " ".join(said.split())
    [stage] = json.loads((tmp_path / "run" / lm_runs.MODEL / cards.STAGES).read_text())["stages"]
    assert (stage["families"], stage["data_sets"]) == (["mirror", "gravity", "scale"], [fields["tasks"]])
    assert "--tasks-share 0.5" in stage["command"]
    assert f"are of {fields['tasks']} instead" in (tmp_path / "run" / lm_runs.MODEL / cards.CARD).read_text()
    assert "going on from step 8 of 8" in run(train_lm, small(tmp_path / "run", **fields))
    data_set(tmp_path / "data", colour=9)
    with pytest.raises(InputError, match="tasks_digest was 'sha256:"):
        run(train_lm, small(tmp_path / "run", **fields))


def test_a_data_set_of_which_nothing_fits_is_refused(tmp_path: Path):
    data_set(tmp_path / "data")
    (tmp_path / "data" / "small.json").unlink()
    with pytest.raises(InputError, match="with 1 answered test inputs, none within 260 tokens"):
        run(train_lm, small(tmp_path / "out", tasks=str(tmp_path / "data"), tasks_share=0.1))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_earlier_version_that_did_not_know_a_flag_goes_on(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "copy")
    note = tmp_path / "copy" / "checkpoints" / "00000008" / "state.json"
    found = json.loads(note.read_text())
    cursor = found["cursor"]
    for name in ("tasks", "tasks_share"):
        del cursor["config"][name]
    cursor["digest"] = files.digest({name: cursor[name] for name in ("config", "history")})
    note.write_text(json.dumps(found))
    assert "going on from step 8 of 8" in run(train_lm, small(tmp_path / "copy"))


# ---------------------------------------------------------------- lessons

TEACHER = lessons.Teacher(course(SMALL))


def test_batches_depend_on_seed_and_step_alone():
    def made(step: int, at_once: int, workers: int) -> list[bytes]:
        calls = lessons.batches(course(SMALL), step, 6, (2, 3), at_once, workers)
        return [np.asarray(rows).tobytes() for call in calls for rows in call.tokens]

    whole = made(0, 2, 0)
    assert len(whole) == 6
    assert len(set(whole)) == 6
    assert made(0, 4, 1) == whole
    assert made(3, 1, 0) == whole[3:]


def test_a_window_deals_its_documents_by_length_and_loses_none():
    each = int(np.prod((2, 3)))
    for number in range(3):
        window = TEACHER.window(number, (2, 3))
        assert len(window) == lessons.WINDOW
        first = number * lessons.WINDOW * each
        expected = sorted(tuple(TEACHER.lesson(first + n).tokens) for n in range(lessons.WINDOW * each))
        rows = [row for step in window for row in step.tokens.reshape(each, -1)]
        assert sorted(tuple(row[: np.flatnonzero(row == TEACHER.tokenizer.eos_id)[-1] + 1]) for row in rows) == expected
        spans = sorted((min(sizes), max(sizes)) for sizes in (_sizes(step) for step in window))
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert len({step.tokens.shape[-1] for step in window}) <= lessons.WIDTHS


def _sizes(step: Batch) -> list[int]:
    rows = step.tokens.reshape(-1, step.tokens.shape[-1])
    return [int(np.flatnonzero(row == TEACHER.tokenizer.eos_id)[-1]) for row in rows]


def test_small_grids_are_drawn_more_often():
    def sides(small: float) -> list[int]:
        teacher = lessons.Teacher(dataclasses.replace(course(SMALL), sides=(2, 6), context=900, small=small))
        tasks = [teacher.task(n) for n in range(200)]
        return [max(*p.input.shape, *p.output.shape) for task in tasks for p in (*task.train, *task.test)]

    whole, some = np.asarray(sides(0.0)), np.asarray(sides(1.0))
    assert max(whole) == max(some) == 6
    assert (some <= 4).mean() > (whole <= 4).mean() + 0.15


def test_a_family_named_twice_is_drawn_twice_as_often():
    teacher = lessons.Teacher(dataclasses.replace(course(SMALL), families=("mirror", "mirror", "gravity")))
    drawn = [exactness.family_of(teacher.task(n)) for n in range(600)]
    assert 340 < drawn.count("mirror") < 460


@pytest.mark.parametrize("encoder", ["padded(4)", "shape(rows(minimal))"])
@pytest.mark.parametrize("learn", ["answer", "outputs", "all"])
def test_a_lesson_is_the_prompt_and_its_right_answer(encoder: str, learn: str):
    teacher = lessons.Teacher(dataclasses.replace(course(SMALL), encoder=encoder, learn=learn), TEACHER.tokenizer)
    task = arc.generators.make_task("gravity", 0, sides=(3, 4))
    lesson = teacher.write(task)
    prompt = teacher.asking.prompt(task, 0)
    text = teacher.tokenizer.decode(lesson.tokens[:-1])
    assert text.startswith(prompt.text)
    grid = arc.parse.parse(text[len(prompt.text) :], encoder, prompt.begun).grid
    np.testing.assert_array_equal(grid, task.test[0].output)
    assert lesson.tokens[-1] == teacher.tokenizer.eos_id
    answer = teacher.tokenizer.decode(
        [t for t, is_answer in zip(lesson.tokens, lesson.answer, strict=True) if is_answer][:-1]
    )
    assert answer == arc.ENCODERS.get(encoder, arc.encode.as_encoder(encoder)).encode(task.test[0].output)
    weighed = teacher.tokenizer.decode([t for t, w in zip(lesson.tokens, lesson.weights, strict=True) if w])
    outputs = [arc.encode.as_encoder(encoder).encode(pair.output) for pair in task.train]
    assert [each in weighed for each in outputs] == [learn != "answer"] * 3
    assert (arc.encode.as_encoder(encoder).encode(task.train[0].input) in weighed) == (learn == "all")


def test_the_tasks_trained_on_are_none_of_those_measured():
    held_out = {str(task.to_dict()) for task in arc.generators.held_out(SMALL.sides, SMALL.families, 8)}
    assert len(held_out) == 24
    trained_on = {str(TEACHER.task(number).to_dict()) for number in range(200)}
    assert not held_out & trained_on


def test_the_measure_is_what_greedy_generation_answers(trained: Path):
    """Right and wrong agree, task by task; that both occur is shown where tokens are chosen (test_qwen_training)."""
    model, _ = qwen_eqx.from_pretrained(trained / lm_runs.MODEL, dtype=jnp.float32)
    tasks = list(arc.generators.held_out((3, 4), ("gravity", "mirror"), 3))
    found = exactness.exact(model, TEACHER, tasks)
    for family, each in found.items():
        mine = [task for task in tasks if exactness.family_of(task) == family]
        for task, right in zip(mine, each, strict=True):
            lesson = TEACHER.write(task)
            cut = int(lesson.answer.argmax())
            out = qwen_eqx.generate(model, [lesson.tokens[:cut]], max_new_tokens=int(lesson.answer.sum()))
            assert (out.tokens[0].tolist() == lesson.tokens[cut:]) == right


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sides": (6, 3)}, "--sides: found 6 3, expected two numbers from 1 to 30"),
        ({"families": ("nothing",)}, "--families: found 'nothing', expected one of mirror"),
        ({"families": ("frame",)}, "found every family, expected some left to train on"),
        ({"turned": 1.5}, "--turned: found 1.5, expected 0 to 1"),
        ({"small": -1.0}, "--small: found -1.0, expected 0 to 1"),
        ({"tasks_share": 1.0}, "--tasks-share: found 1.0, expected at least 0 and less than 1"),
        ({"tasks_share": float("nan")}, "--tasks-share: found nan"),
        ({"tasks_share": 0.1, "tasks": "procedural/3-4"}, "those tasks are for measuring"),
        ({"tasks_share": 0.1, "tasks": "nowhere"}, "source nowhere: no such path"),
        ({"heads": 3}, "--heads: found 3, expected a divisor of d_model=16"),
        ({"context_length": 20}, "--context-length: found 20, expected room for a task"),
        ({"context_length": 40_000}, "--context-length: found 40000, expected at most the model's 32768"),
        ({"encoder": "nothing"}, "encoder 'nothing'"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(tmp_path: Path, fields: dict, said: str):
    with pytest.raises((InputError, arc.InputError)) as raised:
        run(train_lm, small(tmp_path / "out", **fields))
    assert said in str(raised.value)
    assert not (tmp_path / "out").exists()
