"""Rows replayed from a store: whole stores unless a part is meant, and the next group read ahead."""

import dataclasses

import jax
import numpy as np
import pytest

import sae
from qwen_lab import jobs, settings, sources
from qwen_lab.errors import InputError
from qwen_lab.seen import Seen
from stores import MANIFEST, edit_json, write

LONG = dataclasses.replace(MANIFEST, plan=sae.Plan(items=12, items_per_shard=1))


def stored(store: sae.ActivationStore, **more) -> sources.Stored:
    return sources.Stored(store, held_out=1, sites=("b",), prompts=2, **more)


def test_training_on_a_part_of_a_store_is_refused_unless_it_is_meant(tmp_path):
    write(tmp_path, LONG, shards=range(4))
    config = settings.RunConfig(source="store", store=tmp_path, held_out=1, prompts=2)
    with pytest.raises(
        InputError, match=r"4 of 12 shards, missing 4, 5, 6, .*, expected all: .*; --partial-store takes"
    ) as error:
        jobs.open_job(config)
    assert "\n" not in str(error.value)
    job = jobs.open_job(dataclasses.replace(config, partial_store=True))
    assert job.source.tasks_read == 4
    write(tmp_path, LONG)
    assert jobs.open_job(config).source.tasks_read == 12


def test_a_part_of_a_store_settles_nothing():
    """A run that began on a part goes on when the store is whole."""
    config = settings.RunConfig()
    assert settings.settled(config) == settings.settled(dataclasses.replace(config, partial_store=True))


@pytest.mark.parametrize("earlier", [False, True])
def test_groups_are_the_rows_of_their_items_in_any_order(tmp_path, earlier):
    write(tmp_path, LONG)
    if earlier:
        edit_json(tmp_path / "shards/000003.json", item_rows="DROP")
    store = sae.ActivationStore.open(tmp_path)
    source = stored(store)
    items = [range(at, min(at + 2, 11)) for at in range(0, 11, 2)] + [range(11, 12)]
    assert (source.training, source.held_out) == (6, 1)
    for number in (0, 1, 2, 5, 0, 6, 3):
        group = source.group(number)
        wanted = np.isin(store.column("item"), list(items[number]))
        rows = np.asarray(group.rows)[np.asarray(group.valid)]
        np.testing.assert_array_equal(rows[:, 0], store[np.flatnonzero(wanted)].activations[:, 1])
        assert isinstance(group.rows, jax.Array)


def test_damage_found_while_reading_ahead_is_raised_by_the_group_it_is_in(tmp_path):
    write(tmp_path, LONG)
    edit_json(tmp_path / "shards/000002.json", digest="sha256:0")
    source = stored(sae.ActivationStore.open(tmp_path))
    source.group(0)
    with pytest.raises(sae.InputError, match=r"000002\.safetensors: digest"):
        source.group(1)


def test_a_replayed_store_of_other_items_or_weights_is_another(tmp_path):
    def seen(name: str, manifest: sae.Manifest, **more) -> Seen:
        write(tmp_path / name, manifest)
        return stored(sae.ActivationStore.open(tmp_path / name), **more).seen

    first = seen("first", LONG).said
    assert first["items"] == 12
    longer = dataclasses.replace(LONG, plan=sae.Plan(items=14, items_per_shard=1))
    seen("longer", longer).check(first, "--store")
    seen("again", dataclasses.replace(LONG, plan=sae.Plan(12, 3))).check(first, "--store")
    for other in (MANIFEST, dataclasses.replace(LONG, weights_digest="sha256:w")):
        with pytest.raises(InputError, match="--store: found other items than this run began with"):
            seen(f"other{other.plan.items}", other).check(first, "--store")
    with pytest.raises(InputError):
        seen("first", LONG).check({"items": "12", "digest": None}, "--store")
    assert seen("part", LONG, partial=True).said["items"] == 0  # it grows while it is read
