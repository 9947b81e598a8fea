"""find_rules.py: tasks whose variant is known, the places that are looked at, and a variant that was planted is found."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import find_rules
import qwen_eqx
import qwen_lab
from arc.generators import FAMILIES
from qwen_lab import rules
from qwen_lab.errors import InputError
from running import run

MODEL, TOKENIZER = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)


def documents(family: str, each: int) -> tuple[list, list[int]]:
    known = rules.tasks(family, each, (3, 4))
    told = qwen_lab.documents(
        [task for task, _ in known], TOKENIZER, max_tokens=600, encoder="padded(4)", format="compact"
    )
    return told, [number for _, number in known]


@pytest.mark.parametrize("family", rules.families())
def test_a_task_s_variant_is_the_only_one_that_explains_it(family: str):
    rule, known = FAMILIES[family], rules.tasks(family, 12, (3, 5))
    assert len(known) >= 2
    for task, number in known:
        assert rule.consistent(task.train) == [rule.variants[number]]
    counts = np.bincount([number for _, number in known], minlength=len(rule.variants))
    assert counts.max() <= -(-12 // len(rule.variants))


def test_places_are_the_last_cells_of_outputs_and_the_token_before_the_answer():
    told, _ = documents("gravity", 4)
    for document in told:
        at = rules.places(document)
        assert list(at) == ["pair 1 read", "pair 2 read", "pair 3 read", "answer next"]
        assert list(at.values()) == sorted(at.values())
        for pair in range(3):
            last = [cell for cell in document.cells if cell.pair == pair and cell.part == "output"][-1]
            start, end = document.offsets[at[f"pair {pair + 1} read"]]
            assert start <= last.end - 1 < end
        first = next(cell for cell in document.cells if cell.pair == 3 and cell.part == "output")
        assert document.offsets[at["answer next"]][1] <= first.start < document.offsets[at["answer next"] + 1][1]


def test_what_is_read_is_what_a_plain_pass_computes():
    told, labels = documents("scale", 5)
    site = "blocks.1.hook_resid_post"
    found = rules.read(MODEL, told, labels, [site])
    for number, document in enumerate(told):
        _, acts = MODEL.run_with_capture(jnp.asarray(document.tokens), [site])
        for when, at in rules.places(document).items():
            np.testing.assert_allclose(found.rows[when][site][number], acts[site][at], rtol=1e-4, atol=1e-5)


def test_a_planted_variant_is_read_where_it_stands_and_nowhere_else():
    labels = np.arange(60) % 3
    noise = np.asarray(jax.random.normal(jax.random.key(0), (2, 60, 8)), np.float32)
    planted = noise[0] + 5 * np.eye(8, dtype=np.float32)[labels]
    lines = list(rules.probed(rules.Read(labels, {"here": {"a": planted, "b": noise[1]}}), 0))
    assert [(line["when"], line["site"]) for line in lines] == [("here", "a"), ("here", "b")]
    assert lines[0]["probe"] > 0.9
    assert lines[1]["probe"] < 0.7
    assert lines[0]["shuffled"] < 0.7


def test_the_command_measures_beside_random_weights(tmp_path: Path):
    config = find_rules.Config(
        encoder="padded(4)", prompt="compact", families=("scale",), sides=(3, 4), tasks_per_family=8, out=tmp_path
    )
    said = run(find_rules, config)
    assert "block 0" in said
    lines = json.loads((tmp_path / "rules.json").read_text())["scale"]
    assert len(lines) == 4 * (1 + MODEL.config.layers)
    assert {"probe", "shuffled", "commonest", "random weights"} <= set(lines[0])
    assert all(0 <= line[name] <= 1 for line in lines for name in ("probe", "shuffled", "random weights"))
    assert (tmp_path / "rules.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"families": ("recolour",)}, "--families: found 'recolour'"),
        ({"tasks_per_family": 3}, "--tasks-per-family: found 3"),
    ],
)
def test_wrong_flags_are_refused(tmp_path: Path, fields: dict, said: str):
    with pytest.raises(InputError, match=said):
        run(find_rules, find_rules.Config(out=tmp_path / "out", **fields))
    assert not (tmp_path / "out").exists()
