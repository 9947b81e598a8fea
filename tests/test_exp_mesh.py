"""Commands on a mesh: the same rows and answers, whichever devices made them."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import extract
import pipeline
import sae
import solve_arc
import solving
import tolerances
from qwen_lab import errors, flags, meshes
from running import ROOT


def test_rows_do_not_depend_on_the_mesh_and_a_store_may_be_gone_on_with_on_another(tmp_path: Path):
    how: dict[str, Any] = {
        "max_new_tokens": 3,
        "batch_size": 3,
        "dtype": "float32",
        "layers": "0",
        "items_per_shard": 1,
    }
    for name, several in (("one", [None]), ("many", ["data=2,model=2", None])):
        for limit, mesh in enumerate(several, 3 - len(several)):
            extract.main(extract.Config(**how, limit=limit, mesh=mesh, out=tmp_path / name))
    one, many = (sae.ActivationStore.open(tmp_path / name) for name in ("one", "many"))
    assert len(one) == len(many) > 0
    found, expected = many[:], one[:]
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    tolerance = tolerances.SAME_F32
    np.testing.assert_allclose(found.activations, expected.activations, rtol=tolerance["rtol"], atol=tolerance["atol"])


def test_answers_do_not_depend_on_the_mesh(tmp_path: Path):
    source = solving.write_tasks(tmp_path)
    answers = []
    for name, mesh in (("one", None), ("many", "data=4")):
        solving.run(source, tmp_path / name, mesh=mesh)
        answers.append((tmp_path / name / "submission.json").read_bytes())
    assert answers[0] == answers[1]


def test_a_mesh_larger_than_the_devices_is_wrong_input(tmp_path: Path):
    with pytest.raises(
        errors.INPUT_ERRORS, match="mesh: found 'data=64', which takes 64 devices, expected at most the 8"
    ):
        solve_arc.main(solve_arc.Config(mesh="data=64", out=tmp_path))


RUN_NO_MODEL = {"make_tiny_random", "transform_dataset"}  # one writes weights, the other files of tasks
COMMANDS = sorted({path.stem for path in (ROOT / "experiments").glob("*.py")} - RUN_NO_MODEL)


QUICK: dict[str, Any] = {"evaluate_lm": {"tasks_per_family": 1, "compositions": False}}  # tasks are made first


class Opened(Exception):
    """Where a command opens its mesh."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_opens_the_mesh_that_it_is_told_before_it_reads_weights(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So each says, too, which devices it leaves idle: what opens none says that."""

    def opened(self: meshes.OnMesh) -> None:
        raise Opened(self.mesh)

    monkeypatch.setattr(meshes.OnMesh, "open_mesh", opened)
    module = importlib.import_module(command)
    config = next(getattr(module, name) for name in ("Config", "RunConfig", "LMConfig") if hasattr(module, name))
    with pytest.raises(Opened, match="data=2"):
        module.main(config(**QUICK.get(command, {}), mesh="data=2", out=tmp_path / "out"))
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_the_mesh_of_a_pipeline_is_that_of_its_stages_unless_they_name_one(tmp_path: Path):
    words = ["--mesh", "data=2", "--train.mesh", "model=2", "--out", str(tmp_path)]
    config = flags.parse(pipeline.Config, None, words)
    found = {name: getattr(pipeline.shared(config, getattr(config, name)), "mesh", "") for name in pipeline.COMMANDS}
    assert found == {"transform": "", "extract": "data=2", "train": "model=2", "evaluate": "data=2"}
    with pytest.raises(errors.INPUT_ERRORS, match="mesh: found 'data=64', which takes 64 devices"):
        pipeline.main(pipeline.Config(mesh="data=64", out=tmp_path))
