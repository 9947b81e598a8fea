"""The training of dictionaries as a user runs it: small runs end to end, resumed, stopped and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import arc
import extract
import sae
import tolerances
import train_sae
from qwen_lab import errors, jobs, runs, settings, sources, stopping
from running import ROOT, run, run_experiment, short_tasks, small

WEIGHTS = "sae/sae_weights.safetensors"


def test_model_buffer_and_dictionary_share_a_mesh(tmp_path: Path):
    config = small(tmp_path / "run", mesh="data=2,model=2")
    job = jobs.open_job(config)
    run = runs.Run(config, job.members, job.source, job.mesh)
    assert isinstance(job.source, sources.Live)
    held = run.state.module.encoder, run.rows.bits, job.source.model.blocks[0].attn.q.weight
    assert [array.sharding.mesh for array in held] == [job.mesh] * 3
    assert settings.settled(config) == settings.settled(small(tmp_path / "run"))  # so it goes on without one


def test_a_run_leaves_an_sae_a_picture_and_metrics_of_tasks_it_never_saw(trained: Path):
    module, metadata, density = sae.load_with_metadata(trained / "sae")
    assert isinstance(module, sae.TopK)
    assert (module.d_model, module.d_sae, module.k) == (64, 64, 4)
    assert metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert len(metadata["held_out_tasks"]) == 2
    assert density is not None
    assert (trained / "loss.svg").read_text().count("<path") > 3
    found = json.loads((trained / "metrics.json").read_text())["sae"]
    assert found["fvu"] > 0
    assert 0 < found["l0"] <= 4


def test_the_same_command_again_changes_nothing_and_another_config_is_refused(trained: Path):
    before = (trained / WEIGHTS).read_bytes()
    assert "going on from step 8 of 8" in run(train_sae, small(trained))
    assert (trained / WEIGHTS).read_bytes() == before
    with pytest.raises(errors.InputError, match=r"lr was 0\.002 and is 0\.5"):
        run(train_sae, small(trained, lr=0.5))


def test_a_run_is_extended_by_more_steps_and_never_cut(trained: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    taken = []
    real = runs.training.fit

    def watched(state, batches, config, **options):
        for each in real(state, batches, config, **options):
            taken.append((int(each[0].step), config.steps, config.decay_steps))
            yield each

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.training, "fit", watched)
        assert "going on from step 8 of 20" in run(train_sae, small(out, steps=20))
    assert taken == [(step, 20, 4) for step in range(10, 21, 2)]  # the schedule of the new length
    assert runs.checkpoint.steps(out / "checkpoints") == [16, 20]
    history = runs.Run.start(small(out, steps=20), *_job(small(out, steps=20))).history
    assert [entry["step"] for entry in history] == list(range(2, 21, 2))
    assert (out / WEIGHTS).read_bytes() != (trained / WEIGHTS).read_bytes()
    again = tmp_path / "again"  # as far, but stopped in between
    shutil.copytree(trained, again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "_due", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(stopping.Stopped):
            run(train_sae, small(again, steps=20))
    run(train_sae, small(again, steps=20))
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    with pytest.raises(errors.InputError, match="--steps: found 10, expected at least 20, as the run in"):
        run(train_sae, small(again, steps=10))


def test_a_run_is_extended_by_more_tasks_and_never_cut(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "out")
    run(train_sae, small(tmp_path / "out", steps=12, limit=7))
    held_out = [
        sae.load_with_metadata(place / "sae").metadata["held_out_tasks"] for place in (trained, tmp_path / "out")
    ]
    assert held_out[1][0] == held_out[0][1]  # the last ones of more tasks
    with pytest.raises(errors.InputError, match="--limit: found 6, expected at least 7"):
        run(train_sae, small(tmp_path / "out", steps=12))
    with pytest.raises(errors.InputError, match=r"lr was 0\.002 and is 0\.5"):
        run(train_sae, small(tmp_path / "out", steps=12, limit=7, lr=0.5))


def _job(config: runs.RunConfig) -> tuple[list[Any], Any]:
    job = jobs.open_job(config)
    return job.members, job.source


def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(trained: Path, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "_due", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(stopping.Stopped):
            run(train_sae, small(tmp_path))
    assert not (tmp_path / "sae").exists()
    assert runs.checkpoint.steps(tmp_path / "checkpoints") == [2]
    assert "going on from step 2 of 8" in run(train_sae, small(tmp_path))
    ends = [place / "checkpoints" / "00000008" / "state.safetensors" for place in (trained, tmp_path)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert (tmp_path / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_an_l0_is_set_on_tasks_that_are_not_trained_on(tmp_path: Path, monkeypatch):
    config = small(tmp_path, form="jumprelu", k=3, prompts=1, tasks="procedural/3-3", limit=7)
    job = jobs.open_job(config)
    assert job.source.training > 2
    asked: list[int] = []
    group = type(job.source).group
    monkeypatch.setattr(type(job.source), "group", lambda self, number: asked.append(number) or group(self, number))
    one = runs.Run.start(config, job.members, job.source)
    one.proceed()
    kept = range(one.training, job.source.training)
    assert len(kept) >= 1
    assert not set(asked) & set(kept)
    [result] = one.finish(job.facts).values()
    rows = sources.rows_in(job.source, kept, config.sink_times)[:, 0]
    fired = (result.dictionary.module.encode(rows.astype(jnp.float32)) > 0).sum(-1).mean()
    assert float(fired) == pytest.approx(3, rel=0.01)


def test_the_command_line_stops_with_75_and_refuses_with_2(tmp_path: Path):
    flags = ("--limit", "4", "--held-out", "1", "--max-prompt", "512", "--buffer-rows", "16384", "--out", str(tmp_path))
    command = [sys.executable, str(ROOT / "experiments" / "train_sae.py"), *flags, "--steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if (tmp_path / "checkpoints").exists() and runs.checkpoint.steps(tmp_path / "checkpoints"):
                break
            time.sleep(0.2)
        process.terminate()
        _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert error.startswith("stopped: ")
    refused = run_experiment("train_sae", *flags, "--sweep", "depth=3")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --sweep")
    assert refused.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path: Path):
    with pytest.raises(errors.RunError, match=r"step \d+: the loss is not finite"):
        run(train_sae, small(tmp_path, lr=1e30, steps=400))
    for step in runs.checkpoint.steps(tmp_path / "checkpoints"):
        arrays = safetensors.numpy.load_file(tmp_path / "checkpoints" / f"{step:08d}" / "state.safetensors")
        assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f")


def test_a_sweep_trains_the_same_saes_as_single_runs(tmp_path: Path, trained: Path):
    run(train_sae, small(tmp_path, sweep=("k=2,4",)))
    assert sae.load(tmp_path / "sae" / "k2").k == 2  # pyright: ignore[reportAttributeAccessIssue]
    one, many = sae.load(trained / "sae"), sae.load(tmp_path / "sae" / "k4")
    np.testing.assert_allclose(many.decoder, one.decoder, **tolerances.SAME_F32)


def test_live_equals_replay(tmp_path: Path):
    """The same rows in the same order give the same SAE, bit for bit."""
    store = tmp_path / "store"
    options = {"limit": 3, "mode": "forward", "tasks": str(short_tasks(tmp_path))}
    run(extract, extract.Config(**options, items_per_shard=2, layers="2,3", out=store))
    shape = {**options, "held_out": 1, "prompts": 2, "layer": 3, "steps": 4, "max_prompt": 1024}
    run(train_sae, small(tmp_path / "live", **shape))
    run(train_sae, small(tmp_path / "replay", source="store", store=store, **shape))
    assert (tmp_path / "live" / WEIGHTS).read_bytes() == (tmp_path / "replay" / WEIGHTS).read_bytes()


def test_rows_that_were_generated_are_stored_up_to_rounding(tmp_path: Path):
    """What is stored is of one pass over prompt and answer, what is trained on live of the generating loop."""
    options = {"limit": 3, "max_new_tokens": 4, "tasks": str(short_tasks(tmp_path))}
    run(extract, extract.Config(**options, items_per_shard=2, layers="3", out=tmp_path / "store"))
    shape = {**options, "held_out": 1, "prompts": 2, "layer": 3}
    places = ({}, {"source": "store", "store": tmp_path / "store"})
    rows = []
    for place in places:
        group = _job(small(tmp_path / "out", **shape, **place))[1].group(0)
        rows.append(np.asarray(group.rows, np.float32)[np.asarray(group.valid), 0])
    live, stored = rows
    errors = np.linalg.norm(live - stored, axis=1) / np.linalg.norm(stored, axis=1)
    assert errors.max() < tolerances.BF16_ROW


def test_a_buffer_in_the_activations_own_dtype_changes_only_its_bytes(trained: Path, tmp_path: Path, monkeypatch):
    whole, held = runs.buffer.ShuffleBuffer.init, []

    def wide(**options):
        held.append(options.pop("dtype"))
        return whole(**options, dtype=jnp.float32)

    monkeypatch.setattr(runs.buffer.ShuffleBuffer, "init", wide)
    run(train_sae, small(tmp_path))
    assert set(held) == {jnp.dtype(jnp.bfloat16)}
    assert (tmp_path / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_what_was_read_is_counted(tmp_path: Path):
    """There are three tasks, whatever the limit says."""
    store, shape = tmp_path / "store", {"tasks": str(short_tasks(tmp_path)), "max_new_tokens": 4}
    run(extract, extract.Config(**shape, limit=100, encoder="shape(minimal)", positions="generated", out=store))
    shape |= {"limit": 120, "held_out": 1, "steps": 2, "batch_size": 2}
    said = run(train_sae, small(tmp_path / "live", **shape))
    assert re.search(r"these are of all [\d,]+ rows of 1 held-out tasks: prompts with what the model wrote", said)
    said = run(train_sae, small(tmp_path / "replay", source="store", store=store, **shape))
    assert re.search(r"these are of all [\d,]+ rows of 1 held-out tasks: what the model wrote", said)
    live, replay = (sae.load_with_metadata(tmp_path / name / "sae").metadata for name in ("live", "replay"))
    assert live["tasks_read"] == replay["tasks_read"] == 3
    assert live["training"]["limit"] == 120
    assert "limit" not in replay["training"]
    assert "store" not in live["training"]
    assert (live["encoder"], replay["encoder"]) == (arc.DEFAULT_ENCODER, "shape(minimal)")
    assert live["tokenizer_digest"] == replay["tokenizer_digest"]
    metrics = json.loads((tmp_path / "live" / "metrics.json").read_text())["sae"]
    assert f"all {metrics['rows']:,.0f} rows" in metrics["rows_of"]


BAD = [
    ({"sweep": ("depth=1,2",)}, "--sweep"),
    ({"sweep": ("k=4,4",)}, "--sweep"),
    ({"sweep": ("k=0,4",)}, "--k"),
    ({"lr": float("nan")}, "--lr"),
    ({"bias_rate": 0.0}, "--bias-rate"),
    ({"held_out": 6, "limit": 6}, "--held-out"),
    ({"buffer_rows": 100}, "--buffer-rows"),
    ({"layer": 1, "site": "blocks.1.hook_resid_post"}, "--layer, --site"),
    ({"layer": 1, "target_site": "blocks.1.hook_resid_mid"}, "computes before blocks.1.hook_resid_post"),
    ({"site": "blocks.1.hook_mlp_out", "target_site": "model.layers.1.mlp"}, "the site that is read"),
    ({"site": "blocks.0.hook_mlp_out:blocks.1.hook_mlp_out", "target_site": "blocks.2.hook_mlp_out"}, "two targets"),
    ({"site": "blocks.1.attn.hook_z"}, "run_with_capture"),
    ({"sweep": ("layer=1", "site=blocks.1.hook_mlp_out")}, "--layer, --site"),
    ({"sweep": ("site=model.layers.1,blocks.1.hook_resid_post",)}, "twice"),
    ({"sweep": ("site=blocks.1.hook_resid_mid,blocks.1.hook_resid_mid:blocks.1.hook_mlp_out",)}, "one kind"),
    ({"layer": 9}, "blocks.9"),
    ({"source": "store", "store": Path("nowhere")}, "nowhere"),
    ({"max_prompt": 3}, "no prompt"),
]


@pytest.mark.parametrize(("fields", "word"), BAD, ids=[str(word) for _, word in BAD])
def test_bad_input_is_refused_by_name(fields, word, tmp_path: Path):
    with pytest.raises(errors.INPUT_ERRORS, match=word) as caught:
        train_sae.main(runs.RunConfig(**({"limit": 6, "held_out": 2} | fields), out=tmp_path))
    assert "\n" not in str(caught.value)


def test_no_task_is_on_both_sides():
    first, held = sources.split(["a", "a", "b", "c", "c", "d"], 2)
    assert (first, held) == (3, ("c", "d"))
    assert list(sources._parts(6, first, 2)) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
