"""find_features.py: what tokens stand for, a latent that was planted, and what its removal does."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arc
import find_features
import qwen_eqx
import qwen_lab
import sae
from qwen_lab import features, labels
from running import run

SITE = "blocks.1.hook_resid_post"
MODEL, TOKENIZER = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
TASKS = list(arc.generators.held_out((3, 4), ("mirror", "frame", "gravity"), 3))
DOCUMENTS = qwen_lab.documents(TASKS, TOKENIZER, max_tokens=400, encoder="padded(4)", format="compact")


def holds(document, name: str) -> np.ndarray:
    return labels.of_document(document)[:, labels.NAMES.index(name)]


def test_labels_say_what_stands_in_the_text():
    for document in DOCUMENTS:
        pieces, told = document.pieces(), dict(zip(labels.NAMES, labels.of_document(document).T, strict=True))
        for at, piece in enumerate(pieces):
            assert told["read: colour blue"][at] == (piece == "1" and told["read: a cell"][at])
            assert told["read: filler"][at] == (piece == "_")
            if at + 1 < len(pieces):
                assert told["next: colour blue"][at] == told["read: colour blue"][at + 1]
        begun = told["read: the answer has begun"]
        answer = "".join(piece for piece, after in zip(pieces, begun, strict=True) if after)
        truth = next(task for task in TASKS if task.id == document.task).test[document.test].output
        assert answer == arc.encode.as_encoder("padded(4)").encode(truth)
        cells = told["read: a cell"]
        assert cells.sum() == sum(grid.cells.size for grid in document.grids)
        corners = told["read: corner"].sum()
        assert corners == sum(min(2, side) * min(2, other) for side, other in (g.cells.shape for g in document.grids))
        for name in ("read: copied from the input", "read: changed from the input"):
            assert not (told[name] & ~told["read: an output's cell"]).any()


@pytest.fixture(scope="module")
def planted() -> tuple[qwen_lab.Dictionary, qwen_lab.Data]:
    """A dictionary whose latent 3 reads and writes the direction of blue cells' embedding."""
    place = qwen_lab.Place((SITE,), (SITE,))
    data = qwen_lab.Data.read(MODEL, TOKENIZER, DOCUMENTS, [place])
    rows = np.concatenate([np.asarray(acts[SITE]) for acts in data.acts])
    blue = np.concatenate([holds(document, "read: colour blue") for document in DOCUMENTS])
    way = np.linalg.lstsq(np.c_[rows, np.ones(len(rows))], blue.astype(np.float32), rcond=1e-4)[0]
    module = sae.ReLU.init(d_model=64, d_sae=8, key=jax.random.key(0))
    encoder = np.asarray(module.encoder).copy()
    bias = np.full(8, -1e6, np.float32)
    axis = list(encoder.shape).index(8)
    encoder = np.moveaxis(encoder, axis, 0)
    encoder[3] = way[:-1]
    bias[3] = way[-1] - 0.3 + float(way[:-1] @ np.asarray(module.b_dec))
    module = type(module)(
        **{**vars(module), "encoder": jnp.asarray(np.moveaxis(encoder, 0, axis)), "b_enc": jnp.asarray(bias)}
    )
    return qwen_lab.Dictionary("planted", module, place, {}), data


def test_a_planted_latent_is_found_beside_controls(planted):
    dictionary, data = planted
    told = [labels.of_document(document) for document in DOCUMENTS]
    halves = features.Halves.of(DOCUMENTS)
    assert not {DOCUMENTS[n].task for n in halves.choosing} & {DOCUMENTS[n].task for n in halves.measuring}
    found = features.matched(features.codes_of(dictionary, data), told, halves)
    name = labels.NAMES.index("read: colour blue")
    assert found.f1[:, name].argmax() == 3
    assert found.f1[3, name] > 0.8
    codes = features.controls(dictionary, data, data, halves, 0)
    assert set(codes) == {"dimensions", "principal directions", "random directions", "random weights"}
    for control, code in codes.items():
        assert (code(0) >= 0).all(), control
    others = {control: features.matched(code, told, halves) for control, code in codes.items()}
    lines = features.as_rows(found, np.asarray([[3, name]]), others)
    assert lines[0]["property"] == "read: colour blue"
    assert all(0 <= value <= 1 for value in lines[0]["controls"].values())


def test_removing_a_latent_changes_only_where_it_fires(planted):
    dictionary, data = planted
    fires = [features.codes_of(dictionary, data)(number)[:, 3] > 0 for number in range(len(DOCUMENTS))]
    silent = features.removed(data, dictionary, 0, fires, [0, 1])  # latent 0 never fires
    assert (silent.where_it_holds, silent.changed) == (0.0, 0.0)
    assert abs(silent.elsewhere) < 1e-6
    loud = features.removed(data, dictionary, 3, fires, [0, 1])
    assert loud.where_it_holds != 0.0


def test_the_command_writes_pairs_and_controls(tmp_path: Path, planted):
    sae.save(planted[0].module, tmp_path / "sae", {"model_name": "tiny-random", "hook_name": SITE})
    tasks = tmp_path / "tasks.json"
    arc.write_tasks(tasks, TASKS)
    config = find_features.Config(
        sae=(str(tmp_path / "sae"),), tasks=str(tasks), encoder="padded(4)", prompt="compact", best=4, removed=1,
        out=tmp_path / "out",
    )  # fmt: skip
    said = run(find_features, config)
    assert "properties with an F1 of at least 0.8" in said
    (found,) = json.loads((tmp_path / "out" / "features.json").read_text()).values()
    assert len(found["pairs"]) == 4
    assert {"where_it_holds", "elsewhere", "changed"} == set(found["pairs"][0]["removed"]["latent"])
    assert (tmp_path / "out" / "features.svg").read_text().startswith("<?xml")
    with pytest.raises(qwen_lab.InputError, match="fewer than two tasks"):
        run(find_features, find_features.Config(**{**vars(config), "limit": 1, "out": tmp_path / "one"}))
    assert not (tmp_path / "one").exists()
