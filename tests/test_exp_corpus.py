"""Text that dictionaries are trained on: when it counts as other text, and where the cells of its grids stand."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc
import qwen_eqx
from qwen_lab import corpus, texts

WORDS = st.one_of(st.none(), st.text(max_size=3))


@given(*[st.fixed_dictionaries(dict.fromkeys(texts.Text.__dataclass_fields__, WORDS))] * 2)
def test_text_is_other_where_both_say_so_or_it_has_no_name(here: dict[str, Any], there: dict[str, Any]):
    found, trained = texts.Text(**here), texts.Text(**there)
    assert texts.Text.of_metadata(trained.metadata) == trained
    known = {name for name in here if name == "tasks" or None not in (here[name], there[name])}
    assert set(found.differs(trained)) == {name for name in known if here[name] != there[name]}
    assert found.differs(found) == []
    (line,) = texts.warnings(found, {"a": trained, "b": trained}) or [""]
    assert ("a, b" in line) == bool(found.differs(trained))
    assert line.isprintable()


@pytest.mark.parametrize(
    "metadata", [{"dataset_path": "openwebtext"}, {"tasks": 3}, {"tasks": None, "encoder": []}, {}]
)
def test_foreign_metadata_are_other_text(metadata: dict[str, Any]):
    found = texts.Text(model="tiny-random", tasks="arc-agi-1/evaluation", encoder="minimal")
    (line,) = texts.warnings(found, {"theirs": texts.Text.of_metadata(metadata)})
    assert line.endswith("tasks openwebtext" if "dataset_path" in metadata else "text that its metadata do not name")


grids = st.tuples(st.integers(1, 12), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(st.integers(0, 9), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
        lambda cells: arc.as_grid(np.asarray(cells, np.uint8).reshape(shape), "grid")
    )
)


@given(grids, st.sampled_from(sorted(arc.ENCODERS)))
def test_every_cell_is_found_in_every_encoding(grid, name: str):
    """Changing one cell changes text only from that cell's characters on, and all cells have their own."""
    encoder = arc.ENCODERS[name]
    text, spans = encoder.encode(grid), arc.spans.cell_spans(encoder, grid)
    flat = [span for row in spans for span in row]
    assert [len(row) for row in spans] == [grid.shape[1]] * grid.shape[0]
    assert all(a < b for a, b in flat)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(flat))
    for (row, col), value in np.ndenumerate(grid):
        other = grid.copy()
        other[row, col] = (int(value) + 1) % 10
        changed = encoder.encode(other)
        start, end = spans[row][col]
        assert changed[:start] == text[:start]
        assert changed[start:] != text[start:]
        assert changed[len(changed) - (len(text) - end) :] == text[end:]


@pytest.mark.parametrize("name", sorted(arc.PROMPTS))
def test_a_document_is_the_prompt_with_its_answer_and_its_grids_stand_where_they_are_said_to(name: str):
    _, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    tasks = list(arc.load_tasks("arc-agi-1/training"))[:3]
    for document in corpus.documents(tasks, tokenizer, max_tokens=4000, encoder="shape(rows(minimal))", format=name):
        task = next(task for task in tasks if task.id == document.task)
        answer = arc.prompt.answer(task.test[document.test].output, format=name)  # pyright: ignore[reportArgumentType]
        assert document.text.endswith(answer)
        assert tokenizer.encode(document.text) == document.tokens
        for grid in document.grids:
            read = [[int(document.text[a:b]) for a, b in row] for row in grid.spans]
            assert np.array_equal(read, grid.cells)
        for grid in (document.grids[0], document.grids[-1]):
            held = document.tokens_of(grid)
            for at, (start, end) in np.ndenumerate(
                np.asarray([[tuple(span) for span in row] for row in grid.spans], "i,i")
            ):
                touched = [n for n, (a, b) in enumerate(document.offsets) if a < end and b > start]
                assert list(range(*held[at])) == touched
        begun = document.offsets[document.asked][0]
        assert document.offsets[document.asked - 1][0] < len(document.prompt.text) <= begun
        same = document.answered(document.grids[-1].cells, tokenizer)
        assert (same.text, same.offsets, same.cells) == (document.text, document.offsets, document.cells)
