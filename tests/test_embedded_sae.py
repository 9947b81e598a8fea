"""The dictionaries that come with the package: of these very weights, found by name, as good as their card says."""

import dataclasses
import hashlib
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import arc
import evaluate_sae
import find_features
import make_dictionaries
import qwen_eqx
import qwen_lab
import sae
import steer
from qwen_eqx.weights import hub
from qwen_lab import evaluation, loading, sources
from running import run
from sae.evaluation import metrics
from sae.formats.load import EMBEDDED

CARD = EMBEDDED / "tiny-arc" / "README.md"
NAMES = sae.embedded()


def test_they_are_of_the_embedded_model_s_weights_and_small():
    weights = hashlib.sha256((hub.EMBEDDED / "tiny-arc" / "model.safetensors").read_bytes()).hexdigest()
    assert weights in CARD.read_text(), "the model was trained anew: run experiments/make_dictionaries.py"
    assert sum(path.stat().st_size for path in CARD.parent.glob("**/*")) <= 12_000_000
    model, _ = qwen_eqx.from_pretrained("tiny-arc")
    blocks = range(model.config.layers)
    residual = {f"tiny-arc/blocks.{n}.hook_resid_post" for n in blocks}
    transcoders = {f"tiny-arc/blocks.{n}.hook_resid_mid-to-blocks.{n}.hook_mlp_out" for n in blocks}
    assert set(NAMES) == residual | transcoders
    assert loading.EMBEDDED in NAMES
    assert (evaluate_sae.Config().sae, find_features.Config().sae, steer.Config().sae) == (
        (loading.EMBEDDED,), (loading.EMBEDDED,), loading.EMBEDDED,
    )  # fmt: skip


@pytest.fixture(scope="module")
def activations() -> list[dict[str, np.ndarray]]:
    """At all their sites, of a few of the tasks that were held out, with their right answers."""
    told = sae.load_with_metadata(NAMES[0]).metadata
    ids = set(told["held_out_tasks"][:5])
    tasks = [task for task in arc.load_tasks(told["tasks"]) if task.id in ids]
    model, tokenizer = qwen_eqx.from_pretrained("tiny-arc")
    wording = {"encoder": told["encoder"], "format": told["prompt"]}
    documents = qwen_lab.documents(tasks, tokenizer, max_tokens=500, **wording)
    sites = list(dict.fromkeys(site for name in NAMES for site in sites_of(name)))
    return [qwen_eqx.captured(model, document.tokens, sites) for document in documents]


def sites_of(name: str) -> list[str]:
    return name.partition("/")[2].split("-to-")


@pytest.mark.parametrize("name", NAMES[::5])
def test_one_is_as_good_as_its_card_says(name: str, activations: list[dict[str, np.ndarray]]):
    loaded = sae.load_with_metadata(name)
    config = qwen_eqx.QwenConfig.from_file(hub.EMBEDDED / "tiny-arc" / "config.json")
    one = loading.OnModel().dictionary(name, loaded, config)
    told = loaded.metadata
    assert told["held_out_tasks"] == sae.load_with_metadata(NAMES[0]).metadata["held_out_tasks"]
    kind = [each for each in NAMES if ("-to-" in each) == one.place.transcodes]
    sites = list(dict.fromkeys(site for each in kind for site in sites_of(each)))
    xs, ys = [], []
    for acts in activations:
        # a run of several sites leaves out what is a sink at any of them
        kept = np.asarray(sources.wanted(sources.Group.of(jnp.stack([acts[site] for site in sites], axis=1)), 10.0))
        xs.append(one.read(acts)[kept])
        ys.append(one.target(acts)[kept])
    found = metrics.summary(evaluation.totals_of(one.module, jnp.concatenate(xs), jnp.concatenate(ys)))
    claimed = re.search(rf"`{re.escape(name.partition('/')[2])}` \| ([\d.]+) \| ([\d.]+) ", CARD.read_text())
    assert claimed is not None
    assert found["fvu"] == pytest.approx(float(claimed[1]), abs=0.04)
    assert found["l0"] == pytest.approx(float(claimed[2]), rel=0.15)


def test_names_come_before_paths_and_unknown_ones_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-arc").mkdir()
    assert sae.locate("tiny-arc") == EMBEDDED / "tiny-arc"
    assert sae.locate("./tiny-arc") == Path("./tiny-arc")
    assert set(loading.find(["tiny-arc"])) == {name.partition("/")[2] for name in NAMES}
    with pytest.raises(sae.InputError, match="found no such file or directory"):
        sae.load("tiny-arc/nothing/..")


def test_the_command_trains_both_kinds_and_says_so_on_its_card(tmp_path: Path):
    config = make_dictionaries.Config(
        model="tiny-random", d_sae=16, k=2, steps=2, limit=4, held_out=1, runs=tmp_path / "runs", out=tmp_path / "out"
    )
    said = run(make_dictionaries, config)
    assert "8 dictionaries" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--model tiny-random" in card
    assert len(re.findall(r"^\| `blocks", card, re.MULTILINE)) == 8
    loaded = sae.load_with_metadata(tmp_path / "out" / "blocks.1.hook_resid_post")
    assert (loaded.module.d_sae, loaded.metadata["model_name"]) == (16, "tiny-random")
    before = (tmp_path / "out" / "README.md").read_bytes()
    run(make_dictionaries, dataclasses.replace(config))
    assert (tmp_path / "out" / "README.md").read_bytes() == before
