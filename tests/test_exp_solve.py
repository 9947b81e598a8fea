"""From a model and tasks to a scored submission: the right answers score, every kill is survived, wrong input is said."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import answering
import arc
import cli
import extract
import predictions
import qwen_eqx
import running
import sae
from answering import Answer
from solve_arc import Config, main

RIGHT = -1.0


def made_task(name: str, tests: int = 1, answers: bool = True) -> arc.Task:
    """Small grids, so that prompts are short; the answer is the input with 3 for 0."""
    rng = np.random.default_rng(len(name) + ord(name[-1]))
    pairs = []
    for _ in range(2 + tests):
        grid = rng.integers(0, 3, (2, 3)).astype(np.uint8)
        pairs.append(arc.Pair(grid, np.where(grid == 0, 3, grid).astype(np.uint8)))
    asked = tuple(pair if answers else arc.Pair(pair.input, None) for pair in pairs[2:])
    return arc.Task(name, tuple(pairs[:2]), asked)


@pytest.fixture
def source(tmp_path) -> str:
    tasks = [made_task("a"), made_task("b", tests=2), made_task("c")]
    for task in tasks:
        path = tmp_path / "tasks" / f"{task.id}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(task.to_dict()))
    return str(tmp_path / "tasks")


def small(source: str, out: Path, **flags) -> Config:
    usual = {"predictions_per_task": 3, "max_new_tokens": 6, "slots": 2, "dtype": "float32", "items_per_shard": 4}
    return Config(tasks=source, out=out, prompt="compact", encoder="shape(minimal)", **(usual | flags))


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def oracle(wrong: int = 0):
    """A model that knows: answers as text, but for one cell of the first `wrong` of a task's answers."""

    def complete(model, tokenizer, asked, encoder, how, first=0) -> Iterator[list[Answer]]:
        for number, question in enumerate(asked):
            truth = question.task.test[question.test].output
            assert truth is not None
            if number < wrong:
                truth = truth.copy()
                truth[0, 0] = (truth[0, 0] + 1) % 10
            text = arc.prompt.answer(question.view.apply_grid(truth), encoder, "compact")
            tokens = tokenizer.encode(text.removeprefix(question.request.prompt.begun))
            yield [Answer(np.asarray(tokens, np.int32), RIGHT * len(tokens))]

    return complete


def test_right_answers_score_and_the_page_shows_them(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answering, "complete", oracle())
    main(small(source, tmp_path / "out"))
    tasks = arc.load_tasks(source)
    assert arc.score(tmp_path / "out" / "submission.json", tasks) == 1.0
    assert "score 100.0% of 3 tasks" in capsys.readouterr().out
    lines = lines_of(tmp_path / "out")
    assert [line["task"] for line in lines] == ["a"] * 3 + ["b"] * 6 + ["c"] * 3
    assert {line["outcome"] for line in lines} == {"correct"}
    assert all(line["log_prob"] == RIGHT * line["tokens"] for line in lines)
    assert len({(line["task"], line["test"], line["augmentation"]) for line in lines}) == len(lines)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3 + 4  # training pairs of each task, each test input
    assert "<script" not in page
    assert "src=" not in page
    assert 'href="http' not in page
    assert ">right</text>" in page


def test_wrong_by_one_cell_scores_nothing_and_is_marked(source, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "complete", oracle(wrong=99))
    main(small(source, tmp_path / "out"))
    assert arc.score(tmp_path / "out" / "submission.json", arc.load_tasks(source)) == 0.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert ">wrong</text>" in page
    assert arc.render.MARK in page.partition("<h3>")[2]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["right_size_rate"] == 1.0


@pytest.mark.parametrize("select", ["count", "class", "log_prob"])
def test_the_majority_is_submitted_and_select_may_change_afterwards(source, tmp_path, monkeypatch, select):
    monkeypatch.setattr(answering, "complete", oracle(wrong=1))
    main(small(source, tmp_path / "out"))
    done = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    monkeypatch.setattr(answering, "complete", None)  # nothing is generated again
    main(small(source, tmp_path / "out", select=select))
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == done
    assert arc.score(tmp_path / "out" / "submission.json", arc.load_tasks(source)) == 1.0


def test_challenges_without_answers_make_a_submission(tmp_path, capsys):
    tasks = [made_task("a", answers=False), made_task("b", tests=2, answers=False)]
    path = tmp_path / "challenges.json"
    path.write_text(json.dumps({task.id: task.to_dict() for task in tasks}))
    main(small(str(path), tmp_path / "out", predictions_per_task=2))
    submitted = arc.submission.read(tmp_path / "out" / "submission.json", tasks)
    assert [len(entries) for entries in submitted.values()] == [1, 2]
    assert "no answers are known" in capsys.readouterr().out
    assert not (tmp_path / "out" / "scores.json").exists()


def run(source, out, **flags) -> dict[str, bytes]:
    main(small(source, out, **flags))
    names = ["predictions.jsonl", "submission.json"]
    names += [str(path.relative_to(out)) for path in sorted(out.glob("activations/**/*")) if path.is_file()]
    return {name: (out / name).read_bytes() for name in names}


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
    with pytest.raises(arc.InputError, match="line 1: found task 'b', expected line 0 of task a"):
        run(source, out, capture=True)


def test_what_is_drawn_depends_on_the_question_alone(source, tmp_path):
    flags = {"how": "sampled", "temperature": 1.0, "top_p": 1.0}
    run(source, tmp_path / "one", **flags)
    run(source, tmp_path / "other", tasks_together=3, slots=5, **flags)
    texts = [[line["text"] for line in lines_of(tmp_path / name)] for name in ("one", "other")]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 6
    run(source, tmp_path / "seed", seed=1, limit=1, **flags)
    assert [line["text"] for line in lines_of(tmp_path / "seed")] != texts[0][:3]


def test_captured_rows_are_those_of_extract(source, tmp_path):
    same = {"layers": "1,3", "max_new_tokens": 6, "encoder": "shape(minimal)", "prompt": "compact", "dtype": "float32"}
    extract.main(extract.Config(tasks=source, out=tmp_path / "extract", limit=2, items_per_shard=4, **same))
    main(small(source, tmp_path / "out", limit=2, predictions_per_task=1, capture=True, layers="1,3"))
    ours = sae.ActivationStore.open(tmp_path / "out" / "activations")
    theirs = sae.ActivationStore.open(tmp_path / "extract")
    assert ours.complete
    assert ours.sites == theirs.sites
    assert [item["text"] for item in ours.items.values()] == [item["text"] for item in theirs.items.values()]
    for name, column, expected in zip(sae.Rows._fields, ours[:], theirs[:], strict=True):
        if name == "activations":  # prompts of other lengths beside them: sums in another order
            np.testing.assert_allclose(column, expected, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(column, expected)


def test_a_search_finds_all_that_is_probable(source, tmp_path):
    config = small(source, tmp_path / "out", how="threshold", threshold=0.01, max_new_tokens=1, limit=1)
    main(config)
    lines = lines_of(tmp_path / "out")
    model, tokenizer = qwen_eqx.from_pretrained("tiny-arc", dtype=jnp.dtype("float32"))
    asking = arc.Asking(config.encoder, config.prompt, tokenizer.render_chat)
    task = arc.load_tasks(source)[0]
    for view in {line["augmentation"] for line in lines}:
        (request,) = arc.ask.requests(task, [arc.Augmentation.parse(view)], asking)
        logits = np.asarray(model(jnp.asarray(tokenizer.encode(request.prompt.text))), np.float64)[-1]
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        found = [line["log_prob"] for line in lines if line["augmentation"] == view]
        np.testing.assert_allclose(found, np.sort(np.log(probs[probs >= 0.01]))[::-1], rtol=1e-4)
    main(small(source, tmp_path / "none", how="threshold", threshold=1.0, max_new_tokens=2, limit=1))
    assert [line["outcome"] for line in lines_of(tmp_path / "none")] == ["none so probable"] * 3


def test_rescoring_sums_what_the_model_gives_each_answer(source, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "complete", oracle(wrong=1))
    config = small(source, tmp_path / "out", select="rescore", limit=1)
    main(config)
    lines = lines_of(tmp_path / "out")
    assert lines[1]["score"] == lines[2]["score"] != lines[0]["score"]
    model, tokenizer = qwen_eqx.from_pretrained("tiny-arc", dtype=jnp.dtype("float32"))
    task = arc.load_tasks(source)[0]
    asking = arc.Asking(config.encoder, config.prompt, tokenizer.render_chat)
    total = 0.0
    for line in lines:
        view = arc.Augmentation.parse(line["augmentation"])
        (request,) = arc.ask.requests(task, [view], asking)
        answer = arc.prompt.answer(view.apply_grid(arc.as_grid(lines[1]["grid"])), config.encoder, config.prompt)
        prompt = tokenizer.encode(request.prompt.text)
        rest = tokenizer.encode(answer.removeprefix(request.prompt.begun))
        logits = np.asarray(model(jnp.asarray(prompt + rest)), np.float64)[len(prompt) - 1 : -1]
        chosen = logits[np.arange(len(rest)), rest]
        total += float((chosen - np.log(np.exp(logits).sum(-1))).sum())
    assert lines[1]["score"] == pytest.approx(total, rel=1e-4)
    better = max(lines, key=lambda line: line["score"])["grid"]
    submitted = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert submitted["a"][0]["attempt_1"] == better


def test_prompts_that_do_not_fit_are_said_and_leave_the_rest(source, tmp_path):
    path = Path(source) / "b.json"
    big = json.loads(path.read_text())
    for pair in big["train"]:
        pair["input"] = [[0] * 20] * 20
    path.write_text(json.dumps(big))
    main(small(source, tmp_path / "out", max_prompt_tokens=250, capture=True))
    outcomes = {line["task"]: line for line in lines_of(tmp_path / "out")}
    assert outcomes["b"]["outcome"] == "prompt too long"
    assert "expected 250" in outcomes["b"]["detail"]
    assert outcomes["a"]["text"] is not None
    store = sae.ActivationStore.open(tmp_path / "out" / "activations")
    assert store.complete
    assert set(np.unique(store.column("item"))) == {0, 1, 2, 9, 10, 11}


@pytest.mark.parametrize("name", sorted(arc.ENCODERS))
def test_an_answer_ends_with_a_stop_and_holds_none_before(name):
    _, tokenizer = qwen_eqx.from_pretrained("tiny-arc")
    encoder = arc.ENCODERS[name]
    stops = answering.closing_sequences(tokenizer, encoder)
    assert bool(stops) == bool(encoder.opening)
    rng = np.random.default_rng(0)
    for rows, cols in [(1, 1), (30, 30), (2, 7), (11, 3)]:
        grid = rng.integers(0, 10, (rows, cols)).astype(np.uint8)
        written = tokenizer.encode(encoder.encode(grid) + "\n\n### Input")
        ends = [
            at for at in range(len(written) + 1) if any(tuple(written[max(0, at - len(s)) : at]) == s for s in stops)
        ]
        if stops:
            assert arc.parse.parse(tokenizer.decode(written[: ends[0]]), encoder).grid is not None
            assert len(ends) == 1
            assert set(answering.closing_tokens(tokenizer, encoder)) & set(written[: ends[0]][-1:])


def test_a_schedule_draws_by_the_numbers_it_is_given():
    model, _ = qwen_eqx.from_pretrained("tiny-arc", dtype=jnp.dtype("float32"))
    options = {"max_new_tokens": 5, "sampler": qwen_eqx.Temperature(1.0), "items": [7, 2**32 - 1, 0]}
    prompts = [[5, 6], [5, 6], [9, 8, 7]]
    apart = qwen_eqx.generate(model, prompts, **options)
    shared = list(qwen_eqx.schedule(model, prompts, slots=2, order="arrival", **options))
    np.testing.assert_array_equal(np.stack([done.tokens for done in shared]), apart.tokens)
    assert not np.array_equal(shared[0].tokens, shared[1].tokens)
    with pytest.raises(qwen_eqx.InputError, match=r"items\[0\]: found -1"):
        list(qwen_eqx.schedule(model, prompts, slots=2, max_new_tokens=5, items=[-1, 0, 1]))


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
    with pytest.raises((arc.InputError, qwen_eqx.InputError, sae.InputError), match=said) as caught:
        main(Config(**({"tasks": source, "out": tmp_path / "out", "predictions_per_task": 3} | flags)))
    assert "\n" not in str(caught.value)


def test_another_run_is_refused_with_the_differences(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    with pytest.raises(arc.InputError, match="max_new_tokens=6 there, 7 here; seed=0 there, 3 here") as caught:
        run(source, out, seed=3, max_new_tokens=7)
    assert "\n" not in str(caught.value)
    (Path(source) / "c.json").write_text(json.dumps(made_task("z").to_dict()))
    with pytest.raises(arc.InputError, match="tasks_digest="):
        run(source, out)
    (out / "resume.json").unlink()
    with pytest.raises(arc.InputError, match=r"predictions\.jsonl without resume\.json"):
        run(source, out)


def test_repeats_come_round_where_augmentations_run_out(source, tmp_path):
    flags = {"symmetries": False, "colours": False, "how": "sampled", "limit": 1, "temperature": 1.0}
    main(small(source, tmp_path / "out", **flags))
    lines = lines_of(tmp_path / "out")
    assert [(line["augmentation"], line["repeat"]) for line in lines] == [
        ("identity", 0), ("order=1,0", 0), ("identity", 1),
    ]  # fmt: skip
    assert lines[0]["text"] != lines[2]["text"]


def test_a_signal_is_never_taken_for_wrong_input():
    assert not issubclass(cli.Stopped, Exception)  # the tokenizer turns every Exception of its backend into InputError


def test_the_command_exits_as_promised(source, tmp_path):
    flags = ["--tasks", source, "--predictions-per-task", "1", "--max-new-tokens", "2", "--slots", "1", "--limit", "1"]
    done = running.run_experiment("solve_arc", *flags, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    wrong = running.run_experiment("solve_arc", *flags, "--out", str(tmp_path / "out"), "--slots", "0")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--slots: found 0" in wrong.stderr


def test_read_back_lines_rank_as_what_was_said(source, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "complete", oracle(wrong=1))
    config = small(source, tmp_path / "out")
    main(config)
    (task, *_), lines = arc.load_tasks(source), lines_of(tmp_path / "out")[:3]
    begun = arc.prefill(config.encoder, config.prompt)
    ranked = predictions.choose(task, lines, config.encoder, begun, config.select)[0]
    assert [candidate.votes for candidate in ranked] == [2, 1]
    assert [candidate.grid.tolist() for candidate in ranked] == [lines[1]["grid"], lines[0]["grid"]]
