"""Commands on a mesh: the same rows and answers, whichever devices made them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import extract
import sae
import solve_arc
import solving
import tolerances
from qwen_lab import errors


def test_rows_do_not_depend_on_the_mesh_and_a_store_may_be_gone_on_with_on_another(tmp_path: Path):
    how: dict[str, Any] = {
        "max_new_tokens": 3,
        "batch_size": 3,
        "dtype": "float32",
        "layers": "0",
        "items_per_shard": 1,
    }
    for name, meshes in (("one", [None]), ("many", ["data=2,model=2", None])):
        for limit, mesh in enumerate(meshes, 3 - len(meshes)):
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
