"""The embedded model solves puzzles it never saw, as its card says, and every command reads them as it was trained to."""

import dataclasses
import hashlib
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import arc
import evaluate_lm
import extract
import qwen_eqx
import solve_arc
from qwen_eqx.weights.hub import EMBEDDED
from qwen_lab import cards, exactness, lessons, loading, wording
from qwen_lab.errors import InputError
from qwen_lab.lm_settings import HELD_OUT_FAMILIES, LMConfig, course
from qwen_lab.settings import RunConfig
from running import run

DIRECTORY = EMBEDDED / "tiny-arc"
CARD = (DIRECTORY / cards.CARD).read_text()


@pytest.fixture(scope="module")
def model():
    return qwen_eqx.from_pretrained("tiny-arc", dtype=jnp.float32)


def test_the_card_names_these_weights_and_they_are_small():
    weights = (DIRECTORY / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in CARD
    assert len(weights) <= 12_000_000


def test_it_solves_what_its_card_says(model):
    """On the same held-out tasks; the card's are of the weights before they were rounded to bfloat16."""
    claimed = float(re.search(r"(\d+\.\d)% in the\s+mean over the families trained on", CARD)[1]) / 100
    config = LMConfig()
    teacher = lessons.Teacher(course(config), model[1])
    tasks = list(arc.generators.held_out(config.sides, _of_the_card()[0], config.eval_tasks))
    found = float(np.mean(list(exactness.rates(exactness.exact(model[0], teacher, tasks)).values())))
    assert abs(found - claimed) < 0.03, f"found {found:.1%} of {len(tasks)} tasks"
    blank = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)[0]
    assert not any(exactness.rates(exactness.exact(blank, teacher, tasks)).values())


def _of_the_card() -> tuple[list[str], list[str]]:
    """The families of its table: trained on, and never trained on."""
    return re.findall(r"^\| (\w+) \| \d+% \|$", CARD, re.M), re.findall(r"^\| (\w+), never trained on \|", CARD, re.M)


def test_it_claims_the_families_that_it_was_trained_on_and_no_others():
    stages = cards.stages_of(DIRECTORY)
    trained, (listed, apart) = cards.learned(stages, "families"), _of_the_card()
    assert trained is not None
    assert set(HELD_OUT_FAMILIES) == set(apart)
    assert len(listed) >= 26
    assert set(listed) <= set(trained)
    measured_apart = evaluate_lm.never_trained_on(evaluate_lm.Config(), stages)
    assert set(measured_apart) == set(arc.generators.FAMILIES) - set(trained)
    assert set(apart) <= set(measured_apart)
    with pytest.raises(InputError, match="found 'mirror', which the model says it was trained on"):
        evaluate_lm.never_trained_on(evaluate_lm.Config(held_out_families=("mirror",)), stages)


def test_its_directory_says_how_it_reads_puzzles(model):
    said = wording.of_model(model[1])
    assert said == {"encoder": "padded(6)", "prompt": "compact", "tasks": "procedural/3-6"}
    for config in (solve_arc.Config(), extract.Config(), RunConfig()):
        filled = wording.filled(config, model[1])
        assert {name: getattr(filled, name) for name in said} == said
    filled = wording.filled(evaluate_lm.Config(), model[1])
    assert (filled.encoder, filled.prompt) == ("padded(6)", "compact")


def test_flags_and_a_dictionary_s_training_come_before_what_the_model_says(model):
    given = wording.filled(solve_arc.Config(encoder="json", tasks="x"), model[1])
    assert (given.encoder, given.prompt, given.tasks) == ("json", "compact", "x")
    trained = {"encoder": "minimal", "prompt": "output-from-examples-v0", "tasks": 3}
    filled = wording.filled(loading.OnModel(), model[1], trained)
    assert (filled.encoder, filled.prompt) == ("minimal", "output-from-examples-v0")
    plain = wording.filled(solve_arc.Config(), qwen_eqx.from_pretrained("tiny-random")[1])
    assert (plain.encoder, plain.prompt, plain.tasks) == (arc.DEFAULT_ENCODER, arc.DEFAULT_PROMPT, "arc-agi-1/training")


@pytest.mark.parametrize("said", ["text", ["a"], {"encoder": 3}])
def test_a_directory_that_says_it_wrongly_is_refused(model, said):
    with pytest.raises(ValueError, match=r"arc: found .*, expected an object of names"):
        wording.of_model(_saying(model[1], said))


def _saying(tokenizer: qwen_eqx.Tokenizer, said) -> qwen_eqx.Tokenizer:
    name = "tokenizer_config.json"
    settings = json.loads(tokenizer.files[name]) | {"arc": said}
    return dataclasses.replace(tokenizer, files={**tokenizer.files, name: json.dumps(settings).encode()})


def test_solve_arc_without_other_flags_answers_right(tmp_path):
    """By votes over augmentations on the first tasks of the procedural families, one of each."""
    run(solve_arc, solve_arc.Config(model="tiny-arc", limit=10, predictions_per_task=2, out=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert sum(line["grid"] is not None for line in lines) >= 18, "its answers are grids"
    truth = {task.id: [pair.output.tolist() for pair in task.test] for task in arc.load_tasks("procedural/3-6")}
    assert any(line["grid"] == truth[line["task"]][line["test"]] for line in lines)
