"""The SAE experiments as a user runs them: small runs end to end, resumed, stopped and refused; cells found in prompts."""

import dataclasses
import itertools
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

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import arc
import evaluate_sae
import extract
import qwen_eqx
import sae
import steer
import tolerances
import train_sae
from qwen_lab import corpus, errors, jobs, places, runs, settings, sources, splicing, stopping, texts
from running import BRIEF, ROOT, run, run_experiment, short_tasks, small
from sae.evaluation import metrics

WEIGHTS = "sae/sae_weights.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short live run."""
    out = tmp_path_factory.mktemp("trained")
    said = run(train_sae, small(out))
    for word in ("share of the time: model", "buffer", "SAE", "on held-out tasks", "loss curve", "next: python"):
        assert word in said
    return out


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


def test_no_task_is_on_both_sides():
    first, held = sources.split(["a", "a", "b", "c", "c", "d"], 2)
    assert (first, held) == (3, ("c", "d"))
    assert list(sources._parts(6, first, 2)) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
