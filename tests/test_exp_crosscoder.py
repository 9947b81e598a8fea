"""A crosscoder through the commands, none of which knows it: trained live on two sites, resumed, replayed, evaluated."""

import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluate_sae
import extract
import qwen_eqx
import sae
import steer
import tolerances
import train_sae
from qwen_lab import places, runs, splicing, stopping
from qwen_lab.errors import InputError
from qwen_lab.places import Dictionary, Place
from running import run, short_tasks, small
from sae.evaluation import metrics

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out")
FIELDS = {"form": "crosscoder", "site": "+".join(SITES)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short live run."""
    out = tmp_path_factory.mktemp("crosscoder")
    said = run(train_sae, small(out, **FIELDS))
    assert f"1 crosscoder SAE on {'+'.join(SITES)}" in said
    assert "SAELens has no crosscoder" in said
    return out


def test_it_is_saved_with_its_sites_and_evaluated_at_each(trained: Path, tmp_path: Path):
    module, metadata, _ = sae.load_with_metadata(trained / "sae")
    assert isinstance(module, sae.Crosscoder)
    assert module.reads == module.writes == (2, 64)
    assert metadata["hook_name"] == "+".join(SITES)
    evaluation = evaluate_sae.Config(
        sae=(str(trained / "sae"),), steered=2, augmented=1, timelines=0, max_prompt=512, out=tmp_path
    )
    assert "the largest change of a logit is 0" in run(evaluate_sae, evaluation)
    measured = json.loads((tmp_path / "metrics.json").read_text())["sae"]
    assert measured["form"] == "crosscoder"
    assert set(measured["sites"]) == set(SITES)
    assert np.isfinite(measured["ce_recovered"])
    assert "crosscoder, 64 latents" in (tmp_path / "features" / "data" / "index.js").read_text()


def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(trained: Path, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "_due", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(stopping.Stopped):
            run(train_sae, small(tmp_path, **FIELDS))
    assert "going on from step 2 of 8" in run(train_sae, small(tmp_path, **FIELDS))
    for path in ("sae/sae_weights.safetensors", "checkpoints/00000008/state.safetensors"):
        assert (tmp_path / path).read_bytes() == (trained / path).read_bytes(), path


def test_live_equals_replay_and_a_sweep_trains_several(tmp_path: Path):
    shared = {"tasks": str(short_tasks(tmp_path)), "limit": 3, "mode": "forward"}
    stored = {"layers": "none", "sites": SITES, "out": tmp_path / "store"}
    run(extract, extract.Config(**shared, **stored))
    fields = FIELDS | {"held_out": 1, "prompts": 2, "sweep": ("k=2,4",), "max_prompt": 1024}
    run(train_sae, small(tmp_path / "live", **shared, **fields))
    run(train_sae, small(tmp_path / "replay", source="store", store=tmp_path / "store", **fields))
    for name in ("k2", "k4"):
        path = f"sae/{name}/sae_weights.safetensors"
        assert (tmp_path / "live" / path).read_bytes() == (tmp_path / "replay" / path).read_bytes()


def test_without_a_site_it_reads_all_late_blocks():
    config = qwen_eqx.from_pretrained("tiny-random")[0].config
    late = [f"blocks.{layer}.hook_resid_post" for layer in places.parse_layers("late", config.layers)]
    assert places.default_sites(config, sae.Crosscoder).split("+") == late
    assert places.default_sites(config, sae.TopK) == late[0]


def test_what_splicing_it_costs_agrees_with_the_library():
    """All sites are replaced at once by what was made of the clean ones."""
    model, _ = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
    module = sae.Crosscoder.init(sites=2, d_model=64, d_sae=128, k=8, key=jax.random.key(0))
    tokens = list(range(30, 71))
    acts = qwen_eqx.captured(model, tokens, SITES)
    rows = jnp.stack([acts[site] for site in SITES], axis=1)
    module = module.with_threshold(rows)  # without one the pads of a bucket would count as rows of the batch
    made = module(rows)
    edits = {
        "clean": (),
        "spliced": tuple(qwen_eqx.Patch(made[:, n], jnp.arange(41), site=site) for n, site in enumerate(SITES)),
        "zero": tuple(qwen_eqx.Ablate(site=site) for site in SITES),
    }
    tables = [model.run_with_capture(jnp.asarray(tokens), [], edits=edit)[0][:-1] for edit in edits.values()]
    expected = metrics.recovered(lambda _: tables.pop(0), sae.TopK.init(d_model=2, d_sae=2, k=1, key=jax.random.key(0)),
                                 jnp.asarray(tokens[1:]))  # fmt: skip
    found = splicing.recovered(model, Dictionary("sae", module, Place(SITES, SITES)), [tokens])
    assert found["identity"] == 0.0
    for name in ("ce", "ce_sae", "ce_zero", "kl_sae", "kl_zero"):
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **tolerances.SAME_F32)


def test_steering_adds_at_every_site_and_refuses_to_clamp(trained: Path, tmp_path: Path):
    shared = {"sae": str(trained / "sae"), "limit": 1, "max_new_tokens": 4, "max_prompt": 512, "strength": 40.0}
    run(steer, steer.Config(**shared, out=tmp_path))
    written = json.loads((tmp_path / "steer.json").read_text())
    assert (written["site"], written["changed"]) == ("+".join(SITES), 1.0)
    with pytest.raises(InputError, match="--mode: found clamp for a dictionary of"):
        run(steer, steer.Config(**shared, mode="clamp", out=tmp_path))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"form": "topk", "site": "+".join(SITES)}, r"--site: found .* expected one site for a topk; .*: crosscoder"),
        ({"form": "crosscoder", "site": SITES[0], "target_site": SITES[1]}, "expected none: a crosscoder writes"),
        ({"form": "crosscoder", "site": f"{SITES[0]}+{SITES[0]}"}, "expected each site once"),
        ({"form": "crosscoder", "site": f"{SITES[0]}+blocks.9.hook_resid_post"}, r"site 'blocks\.9"),
        ({"form": "crosscoder", "sweep": (f"site={SITES[0]}+{SITES[1]},{SITES[0]}",)}, "places of several kinds"),
        ({"form": "crescoder"}, "--form: found 'crescoder', expected one of relu"),
    ],
    ids=str,
)
def test_places_that_no_dictionary_has_are_refused(tmp_path: Path, fields, expected):
    with pytest.raises((InputError, qwen_eqx.InputError), match=expected):
        run(train_sae, small(tmp_path / "out", **fields))
    assert not (tmp_path / "out").exists()
