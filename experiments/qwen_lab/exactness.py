"""How many held-out tasks a model answers exactly, by family: one pass over their right answers, no generation."""

from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np

import arc
import qwen_eqx
from qwen_eqx import training
from qwen_eqx.sharding import here, mesh_of
from qwen_eqx.training import sharding
from qwen_lab import lessons

ROWS = 32


def family_of(task: arc.Task) -> str:
    return task.id.rpartition("-")[0]


def exact(model: qwen_eqx.Qwen, teacher: lessons.Teacher, tasks: Sequence[arc.Task]) -> dict[str, list[bool]]:
    """Of each family's tasks that fit the context, whether greedy decoding would write the right answer.

    It would where every token of the right answer is the likeliest after those before it.
    """
    pairs = [(family_of(task), teacher.write(task)) for task in tasks]
    pairs = [(family, lesson) for family, lesson in pairs if len(lesson.tokens) <= teacher.course.context]
    mesh = mesh_of(model)
    found: dict[str, list[bool]] = {family: [] for family, _ in pairs}
    pairs.sort(key=lambda pair: len(pair[1].tokens))  # a batch is as wide as its longest
    for begin in range(0, len(pairs), ROWS):
        part = pairs[begin : begin + ROWS]
        rows = [lesson for _, lesson in part] + [part[0][1]] * (ROWS - len(part))
        batch = teacher.padded(rows)
        batch = batch if mesh is None else sharding.place_batch(batch, mesh, 0)
        right = np.asarray(here(_exact(model, batch)))
        for (family, _), one in zip(part, right, strict=False):
            found[family].append(bool(one))
    return found


def rates(found: dict[str, list[bool]]) -> dict[str, float]:
    """The share of each family."""
    return {family: float(np.mean(each)) for family, each in found.items() if each}


@eqx.filter_jit
def _exact(model: qwen_eqx.Qwen, batch: training.Batch) -> jax.Array:
    return training.totals(model, batch).exact
