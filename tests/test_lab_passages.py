"""What is read: texts of any kind and ARC tasks as passages, in one pass, from any cursor, and where their cells stand."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
import qwen_eqx
from qwen_lab import InputError, corpora, prompts, prose, puzzles
from qwen_lab.passages import Cursor, Index, Segment
from qwen_lab.prose import Texts

TOKENIZER = qwen_eqx.Tokenizer.from_directory(Path(qwen_eqx.__file__).parent / "pretrained" / "tiny-random")
TASKS = [arc.load_tasks("arc-agi-1/training")[number] for number in (0, 33)]
WORDS = st.lists(st.text("ab c.\n", max_size=40), min_size=1, max_size=6)


def written(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def corpus(source: str, **how) -> Texts:
    return Texts((source,), TOKENIZER, **{"length": 8, **how})


def every(passages) -> list:
    return list(passages.read([Segment(Cursor(0))]))


@given(WORDS, st.integers(2, 12), st.sampled_from(["split", "pack"]), st.sampled_from([None, 7]))
def test_nothing_is_lost_and_every_context_fits(tmp_path_factory, texts, length: int, fit, bos):
    source = written(tmp_path_factory.mktemp("texts") / "t.jsonl", texts)
    read = [passage for _, passage in every(corpus(source, length=length, fit=fit, bos=bos))]
    ids = [TOKENIZER.encode(text) for text in texts]
    assert all(1 <= len(passage.tokens) <= length for passage in read)
    if fit == "split":
        for number, own in enumerate(ids):
            mine = [passage.tokens for passage in read if passage.said["record"] == number]
            kept = [tokens[bos is not None :] for tokens in mine]
            assert list(itertools.chain(*kept)) == own
            assert bos is None or all(tokens[0] == bos for tokens in mine)
    else:
        assert all(len(passage.tokens) == length for passage in read[:-1])
        whole = [token for passage in read for token in passage.tokens if token != bos]
        assert whole == [token for own in ids for token in own if token != bos]
        assert bos is None or all(passage.tokens[0] == bos for passage in read)


@given(WORDS, st.integers(1, 3), st.sampled_from(["split", "pack", "skip"]), st.sets(st.integers(0, 9)))
def test_any_shards_are_read_as_in_one_pass(tmp_path_factory, texts, size: int, fit, wanted: set[int]):
    texts = [*texts, "something"]
    here = corpus(written(tmp_path_factory.mktemp("texts") / "t.jsonl", texts), fit=fit, length=16)
    try:
        index = Index.of(here, size)
    except InputError:
        return  # all are too long
    all_of_them = [passage.tokens for _, passage in every(here)]
    shards = sorted(shard for shard in wanted if shard < index.plan.shards)
    expected = [(item, all_of_them[item]) for shard in shards for item in index.plan.items_of(shard)]
    assert [(item, passage.tokens) for item, passage in index.read(here, shards)] == expected
    assert index.plan.items == len(all_of_them)
    assert sum(index.tokens) == sum(map(len, all_of_them))


def test_records_are_texts_or_messages_of_every_kind_of_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"messages": [{"role": "user", "content": "four"}]}\n')
    said = [passage.said for _, passage in every(corpus(str(tmp_path), length=100))]
    chat = TOKENIZER.render_chat([{"role": "user", "content": "four"}])
    assert [one["text"] for one in said] == ["one\ntwo\n", "three", chat]
    assert [one["record"] for one in said] == [0, 1, 2]
    assert said[1]["source"].endswith("b.jsonl: line 1")
    assert len(every(corpus(str(tmp_path), length=100, limit=2))) == 2


def test_parquet_is_read_where_pyarrow_is(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": ["one", "two"]}), tmp_path / "t.parquet")
    assert [one.said["text"] for _, one in every(corpus(str(tmp_path / "t.parquet")))] == ["one", "two"]


def test_a_long_text_file_is_read_in_parts(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(prose, "TXT_CHARACTERS", 16)
    lines = [f"line {number}\n" for number in range(20)]
    (tmp_path / "t.txt").write_text("".join(lines))
    parts = [document.text for _, document in prose.documents([str(tmp_path / "t.txt")], TOKENIZER)]
    assert "".join(parts) == "".join(lines)
    assert len(parts) > 5
    assert all(part.endswith("\n") for part in parts)


def test_longer_documents_are_skipped_and_said(tmp_path: Path):
    source = written(tmp_path / "t.jsonl", ["short", "long " * 20])
    short, long = (passage for _, passage in every(corpus(source, fit="skip")))
    assert short.tokens == TOKENIZER.encode("short")
    assert long.tokens == []
    assert long.said["outcome"] == "too long"
    assert "expected at most 8" in long.said["detail"]


@pytest.mark.parametrize(
    ("line", "part"),
    [('{"words": "a"}', "line 2: found words, expected a field `text`"), ("{", "line 2"), ("[1]", "a JSON list")],
)
def test_a_record_that_is_no_text_is_one_line(tmp_path: Path, line: str, part: str):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises((InputError, arc.InputError), match=part) as caught:
        every(corpus(str(tmp_path / "t.jsonl")))
    assert "\n" not in str(caught.value)


class Hub:
    """Stands for `datasets`."""

    @staticmethod
    def load_dataset(name: str, split: str, streaming: bool):
        assert (name, streaming) == ("owner/name", True)
        return iter([{"text": split}, {"text": "b"}])


def test_a_data_set_of_the_hub_by_its_name(monkeypatch):
    assert prose.is_texts("owner/name")
    assert not prose.is_texts("arc-agi-1/training")
    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert [one.said["text"] for _, one in every(corpus("owner/name:test"))] == ["test", "b"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        every(corpus("owner/name"))


def asked(**flags):
    from extract import Config

    model = qwen_eqx.QwenConfig("qwen2", 97, 16, 2, 4, 2, 6, 24, 64, rope_theta=10_000.0, tied=False)
    return corpora.resolved(Config(**flags), model)


def test_numbers_that_nobody_gave(tmp_path: Path):
    texts = written(tmp_path / "t.jsonl", ["a"])
    assert (asked().limit, asked().context_length) == (6, 64)
    read = asked(mode="forward", data=(texts,))
    assert (read.limit, read.context_length) == (None, 64)
    assert asked(mode="forward", data=(texts,), limit=6, context_length=9).limit == 6
    for flags, part in [
        ({"data": (texts,)}, "--mode generate: found texts"),
        ({"context_length": 65}, "--context-length: found 65, expected at most the model's 64"),
        ({"mode": "forward", "data": (texts, "procedural")}, "--data: found texts .* and puzzles .procedural."),
    ]:
        with pytest.raises(InputError, match=part):
            asked(**flags)


def puzzles_of(right: bool, budget: int = 32_000) -> puzzles.Puzzles:
    asking = prompts.asking(TOKENIZER, budget=budget, encoder="minimal", format="compact")
    return puzzles.Puzzles(lambda: TASKS, TOKENIZER, asking, right)


def test_every_cell_of_a_document_is_some_tokens_and_no_token_is_another_cells():
    for _, passage in every(puzzles_of(right=True)):
        assert passage.marks is not None
        assert passage.prompt is not None
        task = next(task for task in TASKS if task.id == passage.said["task"])
        marks, found = passage.marks(), set()
        assert all(len(column) == len(passage.tokens) for column in marks)
        for pair, part, row, col, colour in zip(*marks, strict=True):
            if part == 0:
                assert (pair, row, col, colour) == (-1, -1, -1, -1)
                continue
            own = [*task.train, *task.test][pair]
            grid = own.input if part == 1 else own.output
            assert grid is not None
            assert grid[row, col] == colour
            found.add((pair, part, row, col))
        test = len(task.train) + passage.said["test"]
        pairs = [*enumerate(task.train), (test, task.test[passage.said["test"]])]
        assert len(found) == sum(pair.input.size + pair.output.size for _, pair in pairs if pair.output is not None)
        answer = marks.part[passage.prompt :]
        assert set(answer[marks.pair[passage.prompt :] == test]) == {2}


def test_answers_of_a_file_are_the_passages_of_right_answers(tmp_path: Path):
    """Completions that happen to be right, under no augmentation, after the prompts that were asked."""
    right = [passage for _, passage in every(puzzles_of(right=True))]
    lines = [
        {"task": one.said["task"], "test": one.said["test"], "augmentation": str(arc.augment.IDENTITY)}
        | {"prompt_tokens": one.prompt, "text": one.said["text"]}
        for one in right
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"task": "unknown"}]))
    asking = prompts.asking(TOKENIZER, budget=32_000, encoder="minimal", format="compact")
    given = [passage for _, passage in every(puzzles.Answered(str(path), lambda: TASKS, TOKENIZER, asking))]
    assert [one.tokens for one in given] == [one.tokens for one in right]
    for mine, theirs in zip(given, right, strict=True):
        assert mine.said["outcome"] == "correct"
        assert mine.marks is not None
        assert theirs.marks is not None
        assert all(np.array_equal(*pair) for pair in zip(mine.marks(), theirs.marks(), strict=True))
    lines[0]["prompt_tokens"] += 1
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(InputError, match="prompt_tokens: found"):
        every(puzzles.Answered(str(path), lambda: TASKS, TOKENIZER, asking))


def test_a_puzzle_that_never_fits_is_skipped():
    read = [passage for _, passage in every(puzzles_of(right=True, budget=200))]
    assert {bool(passage.tokens) for passage in read} == {False}
    assert {passage.said["outcome"] for passage in read} == {"too long"}
    with pytest.raises(InputError, match="too long, expected some to read"):
        Index.of(puzzles_of(right=True, budget=200), 2)
