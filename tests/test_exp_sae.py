"""The SAE experiments as a user runs them: small runs end to end, resumed, stopped and refused; cells found in prompts."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import activations
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
import splicing
import train_sae
import training
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT, run_experiment

import arc
import qwen_eqx
import sae
import tolerances
from sae import metrics, train

SMALL = ("--limit", "6", "--held-out", "2", "--max-new-tokens", "4", "--d-sae", "64", "--k", "4")
SHORT = (*SMALL, "--steps", "8", "--batch-size", "64", "--steps-per-call", "2", "--checkpoint-every", "4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A short live run."""
    out = tmp_path_factory.mktemp("trained")
    done = run_experiment("train_sae", *SHORT, "--out", str(out))
    assert done.returncode == 0, done.stderr
    for word in ("share of the time: model", "buffer", "SAE", "on held-out tasks", "loss curve", "next: python"):
        assert word in done.stdout
    return out


def test_a_run_leaves_an_sae_a_picture_and_metrics_of_tasks_it_never_saw(trained: Path):
    module, metadata, density = sae.load_with_metadata(trained / "sae")
    assert isinstance(module, sae.TopK)
    assert (module.d_model, module.d_sae, module.k) == (64, 64, 4)
    assert metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert len(metadata["held_out_tasks"]) == 2
    assert density is not None
    assert (trained / "loss.svg").read_text().count("<path") > 3
    found = json.loads((trained / "metrics.json").read_text())["sae"]
    assert 0 < found["fvu"] and 0 < found["l0"] <= 4
    trained_on = {task.id for task in list(arc.load_tasks("arc-agi-1/training"))[:4]}
    assert not trained_on & set(metadata["held_out_tasks"])


def test_the_same_command_again_changes_nothing_and_another_config_is_refused(trained: Path):
    before = (trained / "sae" / "sae_weights.safetensors").read_bytes()
    again = run_experiment("train_sae", *SHORT, "--out", str(trained))
    assert again.returncode == 0, again.stderr
    assert "going on from step 8 of 8" in again.stdout
    assert (trained / "sae" / "sae_weights.safetensors").read_bytes() == before
    other = run_experiment("train_sae", *SHORT, "--lr", "0.5", "--out", str(trained))
    assert other.returncode == 2
    assert "lr was 0.002 and is 0.5" in other.stderr and other.stderr.count("\n") == 1


def test_a_run_stopped_and_resumed_equals_an_uninterrupted_one(trained: Path, tmp_path: Path):
    steps = ("--steps", "8")
    command = [sys.executable, str(ROOT / "experiments" / "train_sae.py"), *SHORT, *steps, "--out", str(tmp_path)]
    stop_at = "import os, signal, training; old = training.Run._due\n"
    stop_at += "def due(self, taken):\n    os.kill(os.getpid(), signal.SIGTERM)\n    return old(self, taken)\n"
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'experiments')!r}); sys.argv = sys.argv[1:]\n{stop_at}"
    script += "training.Run._due = due\nimport cli, train_sae\ncli.run(train_sae.main, train_sae.Config)"
    stopped = subprocess.run([sys.executable, "-c", script, *command[1:]], capture_output=True, text=True, cwd=ROOT)
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stderr.startswith("stopped: ")
    assert not (tmp_path / "sae").exists()
    resumed = run_experiment("train_sae", *SHORT, "--out", str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step 2 of 8" in resumed.stdout
    whole = sorted((trained / "checkpoints").glob("*/state.safetensors"))[-1]
    parts = sorted((tmp_path / "checkpoints").glob("*/state.safetensors"))[-1]
    assert parts.parent.name == "00000008"
    assert parts.read_bytes() == whole.read_bytes()
    weights = "sae/sae_weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (trained / weights).read_bytes()
    assert signal.SIGTERM  # sent by the run to itself above


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path: Path):
    done = run_experiment("train_sae", *SHORT, "--lr", "1e30", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "the loss is not finite" in done.stderr and "step " in done.stderr and done.stderr.count("\n") == 1
    for step in training.checkpoint.steps(tmp_path / "checkpoints"):
        arrays = sae.files.map_tensors(tmp_path / "checkpoints" / f"{step:08d}" / "state.safetensors")
        assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f")


def test_a_sweep_trains_the_same_saes_as_single_runs(tmp_path: Path, trained: Path):
    done = run_experiment("train_sae", *SHORT, "--sweep", "k=2,4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sae.load(tmp_path / "sae" / "k2").k == 2  # pyright: ignore[reportAttributeAccessIssue]
    one, many = sae.load(trained / "sae"), sae.load(tmp_path / "sae" / "k4")
    np.testing.assert_allclose(many.decoder, one.decoder, **tolerances.SAME_F32)


def test_live_equals_replay(tmp_path: Path):
    """The same rows in the same order give the same SAE, bit for bit."""
    store = str(tmp_path / "store")
    long = ("--max-prompt", "32000", "--prompts", "2", "--layer", "3", "--limit", "3", "--held-out", "1")
    shape = ("--max-new-tokens", "4", "--batch-size", "64", "--steps", "4", "--steps-per-call", "2", "--d-sae", "64")
    wrote = run_experiment(
        "extract", "--limit", "3", "--max-new-tokens", "4", "--batch-size", "2", "--items-per-shard", "2",
        "--layers", "2,3", "--out", store,
    )  # fmt: skip
    assert wrote.returncode == 0, wrote.stderr
    for name, flags in (("live", ()), ("replay", ("--source", "store", "--store", store))):
        done = run_experiment("train_sae", *long, *shape, *flags, "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    weights = "sae/sae_weights.safetensors"
    assert (tmp_path / "live" / weights).read_bytes() == (tmp_path / "replay" / weights).read_bytes()


def test_evaluation_writes_all_it_promises(trained: Path, tmp_path: Path):
    done = run_experiment("evaluate_sae", "--sae", str(trained / "sae"), "--latents", "5", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "metrics.json").read_text())["sae"]
    assert found["identity"] == 0.0
    for name in ("fvu", "explained_variance", "l0", "cosine", "norm_ratio", "ce_recovered", "kl_recovered", "dead"):
        assert np.isfinite(found[name])
    assert found["fvu"] == pytest.approx(1 - found["explained_variance"])
    assert set(found["task"]) <= set(sae.load_with_metadata(trained / "sae").metadata["held_out_tasks"])
    rows = sum(group["rows"] for group in found["position"].values())
    assert rows == sum(group["rows"] for group in found["task"].values()) == found["rows"]
    page = (tmp_path / "report.html").read_text()
    assert "test input" in page and "<rect" in page and "<script" not in page
    assert (tmp_path / "densities.svg").exists() and (tmp_path / "breakdown.svg").exists()


@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_steering_shows_before_and_after(trained: Path, tmp_path: Path, mode: str):
    flags = ("--sae", str(trained / "sae"), "--mode", mode, "--limit", "1", "--max-new-tokens", "8")
    done = run_experiment("steer", *flags, "--strength", "40", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout and "after" in done.stdout
    found = json.loads((tmp_path / "steer.json").read_text())
    assert found["changed"] == 1.0
    if mode == "add":
        nothing = run_experiment("steer", *flags, "--strength", "0", "--out", str(tmp_path))
        assert nothing.returncode == 0, nothing.stderr
        assert json.loads((tmp_path / "steer.json").read_text())["changed"] == 0.0


BAD = [
    (train_sae, {"sweep": ("depth=1,2",)}, "--sweep"),
    (train_sae, {"sweep": ("k=4,4",)}, "--sweep"),
    (train_sae, {"sweep": ("k=0,4",)}, "--k"),
    (train_sae, {"lr": float("nan")}, "--lr"),
    (train_sae, {"held_out": 6, "limit": 6}, "--held-out"),
    (train_sae, {"buffer_rows": 100}, "--buffer-rows"),
    (train_sae, {"layer": 1, "site": "blocks.1.hook_resid_post"}, "--layer, --site"),
    (train_sae, {"layer": 9}, "blocks.9"),
    (train_sae, {"source": "store", "store": Path("nowhere")}, "nowhere"),
    (train_sae, {"max_prompt": 3}, "no prompt"),
]


@pytest.mark.parametrize(("script", "fields", "word"), BAD, ids=[str(word) for *_, word in BAD])
def test_bad_input_is_refused_by_name(script, fields, word, tmp_path: Path):
    with pytest.raises((sae.InputError, arc.InputError, qwen_eqx.InputError), match=word) as caught:
        script.main(training.Config(**({"limit": 6, "held_out": 2} | fields), out=tmp_path))
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
    text, spans = encoder.encode(grid), pages.cell_spans(encoder, grid)
    flat = [span for row in spans for span in row]
    assert [len(row) for row in spans] == [grid.shape[1]] * grid.shape[0]
    assert all(a < b for a, b in flat) and all(b <= a for (_, b), (a, _) in zip(flat, flat[1:], strict=False))
    for (row, col), value in np.ndenumerate(grid):
        other = grid.copy()
        other[row, col] = (int(value) + 1) % 10
        changed = encoder.encode(other)
        start, end = spans[row][col]
        assert changed[:start] == text[:start] and changed[start:] != text[start:]
        assert changed[len(changed) - (len(text) - end) :] == text[end:]


@pytest.mark.parametrize("form", sorted(arc.PROMPTS))
def test_a_document_is_the_prompt_with_its_answer_and_its_grids_stand_where_they_are_said_to(form: str):
    _, tokenizer = qwen_eqx.from_pretrained("tiny-arc")
    tasks = list(arc.load_tasks("arc-agi-1/training"))[:3]
    for document in pages.documents(tasks, tokenizer, max_tokens=4000, encoder="shape(rows(minimal))", form=form):
        task = next(task for task in tasks if task.id == document.task)
        answer = arc.prompt.answer(task.test[document.test].output, form=form)  # pyright: ignore[reportArgumentType]
        assert document.text.endswith(answer)
        assert tokenizer.encode(document.text) == document.tokens
        for grid in document.grids:
            read = [[int(document.text[a:b]) for a, b in row] for row in grid.spans]
            assert np.array_equal(read, grid.cells)
        lit = np.zeros(len(document.tokens), np.float32)
        first = document.grids[0].spans[0][0][0]
        lit[next(i for i, (a, b) in enumerate(document.offsets) if a <= first < b)] = 2.0
        painted = document.painted(lit)
        assert painted[0].activations[0, 0] == 2.0
        assert sum((grid.activations > 0).sum() for grid in painted) < 30  # a token is no longer than that


def test_what_splicing_costs_agrees_with_the_library():
    """Document by document, with pads and edits, gives what `metrics.recovered` gives for one document."""
    model, _ = qwen_eqx.from_pretrained("tiny-arc", dtype=jnp.float32)
    module = sae.TopK.init(d_model=64, d_sae=128, k=8, key=jax.random.key(0))
    tokens, site = list(range(30, 71)), "blocks.1.hook_resid_post"

    def logits(edit):
        return model.run_with_capture(jnp.asarray(tokens), [], edits=[qwen_eqx.Replace(edit, site=site)])[0][:-1]

    expected = metrics.recovered(logits, module, jnp.asarray(tokens[1:]))
    found = splicing.recovered(model, module, [tokens], site)
    assert found.pop("identity") == 0.0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **tolerances.SAME_F32)


def test_clamping_holds_one_latent():
    module = sae.ReLU.init(d_model=8, d_sae=16, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 8))
    held = splicing.Clamped(module, jnp.int32(3), jnp.float32(7.0))(x)
    z = module.encode(x).at[:, 3].set(7.0)
    np.testing.assert_allclose(held, module.decode(z), **tolerances.SAME_F32)


def test_no_task_is_on_both_sides():
    first, held = activations.split(["a", "a", "b", "c", "c", "d"], 2)
    assert (first, held) == (3, ("c", "d"))
    assert list(activations._parts(6, first, 2)) == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)]
    assert train.TrainConfig(steps=8)  # the defaults are a valid config
