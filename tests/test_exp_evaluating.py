"""Dictionaries evaluated and steered as a user does it: other text, several at once, what splicing and clamping do."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arc
import evaluate_sae
import qwen_eqx
import sae
import steer
import tolerances
from qwen_lab import places, splicing
from running import BRIEF, run
from sae.evaluation import metrics


def test_evaluation_writes_all_it_promises(trained: Path, tmp_path: Path):
    said = run(
        evaluate_sae,
        evaluate_sae.Config(
            sae=(str(trained / "sae"),), steered=2, augmented=1, timelines=1, max_prompt=512, out=tmp_path
        ),
    )
    assert "the largest change of a logit is 0" in said
    found = json.loads((tmp_path / "metrics.json").read_text())["sae"]
    assert found["identity"] == 0.0
    for name in ("fvu", "explained_variance", "l0", "cosine", "norm_ratio", "ce_recovered", "kl_recovered", "dead"):
        assert np.isfinite(found[name])
    assert found["fvu"] == pytest.approx(1 - found["explained_variance"])
    assert set(found["task"]) <= set(sae.load_with_metadata(trained / "sae").metadata["held_out_tasks"])
    rows = sum(group["rows"] for group in found["position"].values())
    assert rows == sum(group["rows"] for group in found["task"].values()) == found["rows"]
    assert f"these are of {found['rows_of']}" in said
    assert re.fullmatch(rf"{rows:,.0f} rows of \d+ documents of [12] of 2 tasks: .*right answers", found["rows_of"])
    site = tmp_path / "features"
    told = json.loads((site / "data" / "index.js").read_text().removeprefix('receive("index",')[:-3])
    assert [(one["key"], one["latents"]) for one in told["dictionaries"]] == [("0", 64)]
    assert "steered" in dict(told["dictionaries"][0]["notes"])
    assert '"title":"right answer"' in (site / "data" / "documents" / "0000.js").read_text()
    page = (site / "data" / "0" / "0000.js").read_text()
    for kind in ("turned", "recoloured", "reordered", "principal directions", '"steered":{'):
        assert kind in page
    assert (tmp_path / "densities.svg").exists()
    assert (tmp_path / "breakdown.svg").exists()
    assert f"answers being computed: {tmp_path / 'features' / 'tasks' / 'index.html'}" in said
    (answer,) = [path for path in (tmp_path / "features" / "tasks").iterdir() if path.name != "index.html"]
    told = json.loads(answer.read_text().partition('id="data">')[2].partition("</script>")[0])
    assert all(len(step["top"]) <= 4 for step in told["steps"])  # what fires at all, of a dictionary with k=4
    assert all(0 <= step["p"] <= 1 for step in told["steps"])


def test_other_text_is_said_first_and_kept(trained: Path, tmp_path: Path):
    config = evaluate_sae.Config(sae=(str(trained / "sae"),), **BRIEF, limit=1, max_prompt=512, out=tmp_path / "same")
    assert "other text" not in run(evaluate_sae, config)
    same = json.loads((tmp_path / "same" / "metrics.json").read_text())["sae"]
    assert same["text"]["differs"] == []
    assert same["text"]["found"] == same["text"]["trained_on"]
    other = dataclasses.replace(config, tasks="arc-agi-2/training", encoder="shape(minimal)", out=tmp_path / "other")
    first = run(evaluate_sae, other).splitlines()[0]
    assert first == (
        "other text than sae learned: found tasks arc-agi-2/training, encoder shape(minimal); trained on tasks "
        f"arc-agi-1/training, encoder {arc.DEFAULT_ENCODER}"
    )
    text = json.loads((tmp_path / "other" / "metrics.json").read_text())["sae"]["text"]
    assert (text["differs"], text["found"]["tasks"]) == (["tasks", "encoder"], "arc-agi-2/training")


def test_several_saes_are_compared_and_foreign_ones_are_read(trained: Path, tmp_path: Path):
    foreign = sae.BatchTopK.init(d_model=144, d_sae=32, k=4, key=jax.random.key(0))  # at a site of another width
    foreign = foreign.with_threshold(jax.random.normal(jax.random.key(1), (64, 144)))
    sae.save(foreign, tmp_path / "many" / "other", {"model_name": "tiny-random", "hook_name": "blocks.1.mlp.hook_post"})
    shutil.copytree(trained / "sae", tmp_path / "many" / "ours")
    config = evaluate_sae.Config(sae=(str(tmp_path / "many"),), tasks="arc-agi-1/training", limit=2, **BRIEF)
    run(evaluate_sae, dataclasses.replace(config, max_prompt=512, out=tmp_path / "out"))
    assert set(json.loads((tmp_path / "out" / "metrics.json").read_text())) == {"ours", "other"}
    picture = (tmp_path / "out" / "fvu_l0.svg").read_text()
    assert len(picture) < 60_000
    assert "batchtopk, blocks.1.mlp.hook_post" in picture


@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_steering_shows_before_and_after(trained: Path, tmp_path: Path, mode: Any):
    config = steer.Config(sae=str(trained / "sae"), mode=mode, limit=2, max_new_tokens=4, max_prompt=512, out=tmp_path)
    said = run(steer, dataclasses.replace(config, strength=40.0))
    assert "before" in said
    assert "after" in said
    assert "other text" not in said
    assert json.loads((tmp_path / "steer.json").read_text())["changed"] > 0
    if mode == "add":
        other = run(steer, dataclasses.replace(config, strength=0.0, encoder="shape(minimal)"))
        assert (
            f"other text than {config.sae} learned: found encoder shape(minimal); trained on encoder shape(rows"
            in other
        )
        assert json.loads((tmp_path / "steer.json").read_text())["changed"] == 0


def test_what_splicing_costs_agrees_with_the_library():
    """Document by document, with pads and edits, gives what `metrics.recovered` gives for one document."""
    model, _ = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
    module = sae.TopK.init(d_model=64, d_sae=128, k=8, key=jax.random.key(0))
    tokens, site = list(range(30, 71)), "blocks.1.hook_resid_post"

    def logits(edit):
        return model.run_with_capture(jnp.asarray(tokens), [], edits=[qwen_eqx.Replace(edit, site=site)])[0][:-1]

    expected = metrics.recovered(logits, module, jnp.asarray(tokens[1:]))
    found = splicing.recovered(model, places.Dictionary("sae", module, places.Place((site,), (site,))), [tokens])
    assert found.pop("identity") == 0.0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **tolerances.SAME_F32)


def test_clamping_holds_one_latent():
    module = sae.ReLU.init(d_model=8, d_sae=16, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 8))
    held = sae.Clamped(module, jnp.int32(3), jnp.float32(7.0))(x)
    z = module.encode(x).at[:, 3].set(7.0)
    np.testing.assert_allclose(held, module.decode(z), **tolerances.SAME_F32)
