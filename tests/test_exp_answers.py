"""From a model and tasks to a scored submission: right answers score, what is probable is found, votes are counted."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import arc
import qwen_eqx
from qwen_lab import answering, predictions
from solve_arc import main
from solving import RIGHT, lines_of, made_task, oracle, run, small, write_tasks


@pytest.fixture
def source(tmp_path) -> str:
    return write_tasks(tmp_path)


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
    pictured = (
        3 * 4 + 4 * 3 + 4
    )  # grids of two training pairs; asked, answered and true of each test; an answer voted for
    assert page.count("<svg") == pictured
    assert page.count("<script>") == page.count("<script") == 1  # the page's own
    assert "src=" not in page
    assert 'href="http' not in page
    assert "attempt 1: right</figcaption>" in page


def test_wrong_by_one_cell_scores_nothing_and_is_marked(source, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "complete", oracle(wrong=99))
    main(small(source, tmp_path / "out"))
    assert arc.score(tmp_path / "out" / "submission.json", arc.load_tasks(source)) == 0.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "attempt 1: wrong</figcaption>" in page
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


def test_what_is_drawn_depends_on_the_question_alone(source, tmp_path):
    flags = {"how": "sampled", "temperature": 1.0, "top_p": 1.0}
    run(source, tmp_path / "one", **flags)
    run(source, tmp_path / "other", tasks_together=3, slots=5, **flags)
    texts = [[line["text"] for line in lines_of(tmp_path / name)] for name in ("one", "other")]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 6
    run(source, tmp_path / "seed", seed=1, limit=1, **flags)
    assert [line["text"] for line in lines_of(tmp_path / "seed")] != texts[0][:3]


def test_a_search_finds_all_that_is_probable(source, tmp_path):
    config = small(source, tmp_path / "out", how="threshold", threshold=0.01, max_new_tokens=1, limit=1)
    main(config)
    lines = lines_of(tmp_path / "out")
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.dtype("float32"))
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
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.dtype("float32"))
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


@pytest.mark.parametrize("name", sorted(arc.ENCODERS))
def test_an_answer_ends_with_a_stop_and_holds_none_before(name):
    _, tokenizer = qwen_eqx.from_pretrained("tiny-random")
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
    model, _ = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.dtype("float32"))
    options = {"max_new_tokens": 5, "sampler": qwen_eqx.Temperature(1.0), "items": [7, 2**32 - 1, 0]}
    prompts = [[5, 6], [5, 6], [9, 8, 7]]
    apart = qwen_eqx.generate(model, prompts, **options)
    shared = list(qwen_eqx.schedule(model, prompts, slots=2, order="arrival", **options))
    np.testing.assert_array_equal(np.stack([done.tokens for done in shared]), apart.tokens)
    assert not np.array_equal(shared[0].tokens, shared[1].tokens)
    with pytest.raises(qwen_eqx.InputError, match=r"items\[0\]: found -1"):
        list(qwen_eqx.schedule(model, prompts, slots=2, max_new_tokens=5, items=[-1, 0, 1]))


def test_repeats_come_round_where_augmentations_run_out(source, tmp_path):
    flags = {"symmetries": False, "colours": False, "how": "sampled", "limit": 1, "temperature": 1.0}
    main(small(source, tmp_path / "out", **flags))
    lines = lines_of(tmp_path / "out")
    assert [(line["augmentation"], line["repeat"]) for line in lines] == [
        ("identity", 0), ("order=1,0", 0), ("identity", 1),
    ]  # fmt: skip
    assert lines[0]["text"] != lines[2]["text"]


def test_read_back_lines_rank_as_what_was_said(source, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "complete", oracle(wrong=1))
    config = small(source, tmp_path / "out")
    main(config)
    (task, *_), lines = arc.load_tasks(source), lines_of(tmp_path / "out")[:3]
    begun = arc.prefill(config.encoder, config.prompt)
    ranked = predictions.choose(task, lines, config.encoder, begun, config.select)[0]
    assert [candidate.votes for candidate in ranked] == [2, 1]
    assert [candidate.grid.tolist() for candidate in ranked] == [lines[1]["grid"], lines[0]["grid"]]
