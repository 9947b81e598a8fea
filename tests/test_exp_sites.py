"""Several sites in one pass of the model, and transcoders: live, from a store, resumed, evaluated, used to steer."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluate_sae
import extract
import qwen_eqx
import sae
import steer
import tiny
import tolerances
import train_sae
from qwen_eqx.model.sites import KINDS
from qwen_lab import loading, runs, splicing, stopping
from qwen_lab.errors import InputError
from qwen_lab.places import Dictionary, Place
from running import BRIEF, run, short_tasks, small
from sae.evaluation import metrics

TRANSCODER = {"site": "blocks.1.hook_resid_mid", "target_site": "blocks.1.hook_mlp_out"}
SWEEP = {"sweep": ("layer=1,3", "k=2,4")}
NAMES = [f"blocks.{layer}.hook_resid_post-k{k}" for layer in (1, 3) for k in (2, 4)]


@pytest.fixture(scope="module")
def transcoder(tmp_path_factory) -> Path:
    """A short live run."""
    out = tmp_path_factory.mktemp("transcoder")
    assert "1 topk transcoder on blocks.1.hook_resid_mid-to-blocks.1.hook_mlp_out" in run(
        train_sae, small(out, **TRANSCODER)
    )
    return out


def counted(out: Path, **fields: Any) -> tuple[Path, list[qwen_eqx.Capture]]:
    """A short live run, and what each pass of the model captured."""
    passes, generate = [], qwen_eqx.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_eqx, "generate", lambda *a, **b: passes.append(b["capture"]) or generate(*a, **b))
        run(train_sae, small(out, **fields))
    return out, passes


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, list[qwen_eqx.Capture]]:
    return counted(tmp_path_factory.mktemp("swept"), **SWEEP)


def test_one_pass_of_the_model_serves_every_site_as_a_run_of_its_own_would(swept, tmp_path: Path):
    out, passes = swept
    assert sorted(path.name for path in (out / "sae").iterdir()) == NAMES
    alone, single = counted(tmp_path, layer=3)
    assert len(passes) == len(single)
    assert passes[-1].sites == ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
    one, many = sae.load(alone / "sae"), sae.load_with_metadata(out / "sae" / NAMES[3])
    np.testing.assert_allclose(many.module.decoder, one.decoder, **tolerances.SAME_F32)
    assert many.metadata["hook_name"] == "blocks.3.hook_resid_post"
    found = json.loads((out / "metrics.json").read_text())
    assert [found[name]["site"] for name in NAMES] == [name[:-3] for name in NAMES]


@pytest.mark.parametrize("what", ["transcoder", "swept"])
def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(what: str, request, tmp_path: Path, monkeypatch):
    whole, fields = request.getfixturevalue(what), TRANSCODER
    if what == "swept":
        (whole, _), fields = whole, SWEEP
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "_due", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(stopping.Stopped):
            run(train_sae, small(tmp_path, **fields))
    assert "going on from step 2 of 8" in run(train_sae, small(tmp_path, **fields))
    saved = sorted(path.relative_to(whole) for path in whole.glob("**/*.safetensors"))
    assert len(saved) == (2 + 2 if what == "transcoder" else 2 + 8)
    for path in saved:
        assert (tmp_path / path).read_bytes() == (whole / path).read_bytes(), path


def test_live_equals_replay(tmp_path: Path):
    """A sweep of two transcoders, bit for bit."""
    pairs = "blocks.1.hook_resid_mid:blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out:blocks.2.hook_resid_post"
    names = (f"site={','.join(pairs)}",)
    store, shared = tmp_path / "store", {"limit": 3, "tasks": str(short_tasks(tmp_path)), "mode": "forward"}
    sites = ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid", "blocks.2.hook_resid_post")
    run(extract, extract.Config(**shared, layers="none", sites=sites, out=store))
    shared |= {"held_out": 1, "prompts": 2, "steps": 4, "max_prompt": 1024}
    run(train_sae, small(tmp_path / "live", **shared, sweep=names))
    run(train_sae, small(tmp_path / "replay", source="store", store=store, **shared, sweep=names))
    weights = sorted((tmp_path / "live").glob("sae/**/sae_weights.safetensors"))
    assert [path.parent.name for path in weights] == sorted(pair.replace(":", "-to-") for pair in pairs)
    for path in weights:
        other = tmp_path / "replay" / path.relative_to(tmp_path / "live")
        assert path.read_bytes() == other.read_bytes()
    with pytest.raises(InputError, match="expected one that the store holds: "):
        run(train_sae, small(tmp_path / "no", source="store", store=store, layer=3, **shared))


def test_a_transcoder_is_saved_as_one_and_evaluated_where_it_writes(transcoder: Path, tmp_path: Path):
    module, metadata, _ = sae.load_with_metadata(transcoder / "sae")
    config = json.loads((transcoder / "sae" / "cfg.json").read_text())
    assert config["architecture"] == "topk_transcoder"
    assert not module.apply_b_dec_to_input
    assert (metadata["hook_name"], metadata["hook_name_out"]) == tuple(TRANSCODER.values())
    evaluation = evaluate_sae.Config(sae=(str(transcoder / "sae"),), **BRIEF, max_prompt=512, out=tmp_path)
    assert "the largest change of a logit is 0" in run(evaluate_sae, evaluation)
    found = json.loads((tmp_path / "metrics.json").read_text())["sae"]
    trained = json.loads((transcoder / "metrics.json").read_text())["sae"]
    assert found["site"] == trained["site"] == "blocks.1.hook_resid_mid-to-blocks.1.hook_mlp_out"
    assert found["fvu"] == pytest.approx(trained["fvu"], rel=0.1)  # other documents of the same tasks
    assert np.isfinite(found["ce_recovered"])


def test_what_splicing_a_transcoder_costs_agrees_with_the_library():
    model, _ = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
    module = sae.TopK.init(d_model=64, d_out=64, d_sae=128, k=8, key=jax.random.key(0))
    (reads, writes), tokens = TRANSCODER.values(), list(range(30, 71))
    x = qwen_eqx.captured(model, tokens, [reads])[reads]
    edits = {
        "clean": (),
        "spliced": (qwen_eqx.Patch(module(x), jnp.arange(41), site=writes),),
        "zero": (qwen_eqx.Ablate(site=writes),),
    }
    tables = [model.run_with_capture(jnp.asarray(tokens), [], edits=edit)[0][:-1] for edit in edits.values()]
    expected = metrics.recovered(lambda _: tables.pop(0), module, jnp.asarray(tokens[1:]))
    found = splicing.recovered(model, Dictionary("sae", module, Place((reads,), (writes,))), [tokens])
    assert found.pop("identity") == 0.0
    for name in ("ce", "ce_sae", "ce_zero", "kl_sae", "kl_zero"):
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **tolerances.SAME_F32)
    gained, gap = found["ce_zero"] - found["ce_sae"], found["ce_zero"] - found["ce"]
    assert found["ce_recovered"] == pytest.approx(gained / gap)  # the gap is small: a ratio of two rounded differences


def test_a_perfect_transcoder_costs_nothing():
    """From the end of one block to the start of the next, z = ReLU(±x) gives x back."""
    model, _ = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
    both = jnp.concatenate([jnp.eye(64), -jnp.eye(64)])
    module = sae.ReLU(both, jnp.zeros(128), both, jnp.zeros(64), apply_b_dec_to_input=False)
    place = Place(("blocks.1.hook_resid_post",), ("blocks.2.hook_resid_pre",))
    found = splicing.recovered(model, Dictionary("sae", module, place), [list(range(30, 71))])
    assert found["ce_recovered"] == pytest.approx(1)
    assert found["kl_sae"] == pytest.approx(0, abs=1e-6)


def test_steering_adds_where_a_transcoder_writes_and_refuses_to_clamp(transcoder: Path, tmp_path: Path):
    shared = {"sae": str(transcoder / "sae"), "limit": 1, "max_new_tokens": 4, "max_prompt": 512, "strength": 40.0}
    run(steer, steer.Config(**shared, out=tmp_path))
    found = json.loads((tmp_path / "steer.json").read_text())
    assert (found["site"], found["changed"]) == (TRANSCODER["target_site"], 1.0)
    with pytest.raises(InputError, match="--mode: found clamp for a dictionary of"):
        run(steer, steer.Config(**shared, mode="clamp", out=tmp_path))


def test_the_order_of_sites_is_the_models():
    """A later site never changes an earlier one, which is what splicing a transcoder rests on."""
    model = tiny.model()
    names = [f"blocks.{layer}.{suffix}" for layer in (0, 1) for kind, (suffix, _) in KINDS.items() if kind != "pattern"]
    tokens = jnp.arange(30, 46)
    clean = model.run_with_capture(tokens, names)[1]
    for number, name in enumerate(names):
        if name.startswith("blocks.0."):
            continue  # the blocks are alike, and before the second one's sites stand all of the first one's
        edited = model.run_with_capture(tokens, names, edits=[qwen_eqx.Ablate(site=name)])[1]
        for other in names[:number]:
            np.testing.assert_array_equal(edited[other], clean[other])
    depths = [qwen_eqx.Site.parse(name, model.config).depth for name in names]
    assert depths == sorted(set(depths))


def test_foreign_saes_are_placed_by_flags():
    config = qwen_eqx.from_pretrained("tiny-random")[0].config
    module = sae.TopK.init(d_model=64, d_out=144, d_sae=32, k=2, key=jax.random.key(0))
    flags = loading.OnModel(site="blocks.1.hook_resid_mid", target_site="blocks.1.mlp.hook_post")
    assert flags.place(config, module, {}).writes == ("blocks.1.mlp.hook_post",)
    said = {"hook_name": "blocks.0.hook_resid_mid", "hook_name_out": "blocks.2.mlp.hook_post"}
    assert loading.OnModel(layer=1).place(config, module, said) == Place(
        ("blocks.1.hook_resid_post",), ("blocks.2.mlp.hook_post",)
    )
    with pytest.raises(InputError, match=r"found an SAE from 64 to 144, expected 64 at blocks.1.hook_resid_post"):
        loading.OnModel(layer=1).place(config, module, {})
    with pytest.raises(InputError, match="the SAE names none"):
        loading.OnModel().place(config, module, {})
