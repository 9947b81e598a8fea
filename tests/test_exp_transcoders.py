"""Transcoders of all MLPs through the commands: across layers live and replayed, in a sweep, as one set, in one model."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluate_sae
import extract
import qwen_eqx
import sae
import tiny
import train_sae
from qwen_lab import places, runs, settings, splicing, sweeps
from qwen_lab.errors import InputError
from qwen_lab.places import Dictionary, Place
from running import BRIEF, run, short_tasks, small

CONFIG = qwen_eqx.from_pretrained("tiny-random")[0].config
ENDS = [[f"blocks.{layer}.{kind}" for layer in range(CONFIG.layers)] for kind in ("hook_resid_mid", "hook_mlp_out")]


def test_one_across_layers_is_trained_from_a_store_and_measured_layer_by_layer(tmp_path: Path):
    shared = {"tasks": str(short_tasks(tmp_path)), "limit": 3, "mode": "forward"}
    run(extract, extract.Config(**shared, layers="none", sites=(*ENDS[0], *ENDS[1]), out=tmp_path / "store"))
    stored = {"source": "store", "store": tmp_path / "store", "held_out": 1, "prompts": 2}
    said = run(train_sae, small(tmp_path / "run", form="clt", **stored))
    assert "1 clt transcoder on blocks.0.hook_resid_mid+blocks.1" in said
    (measured,) = json.loads((tmp_path / "run" / "metrics.json").read_text()).values()
    assert list(measured["sites"]) == ENDS[1]
    found = sae.load_transcoders(tmp_path / "run" / "sae")
    assert (found.n_layers, found.crosses, found.d_sae) == (CONFIG.layers, True, 64 // CONFIG.layers)
    assert (found.input_site, found.output_site) == ("hook_resid_mid", "hook_mlp_out")
    out = tmp_path / "evaluated"
    said = run(evaluate_sae, evaluate_sae.Config(sae=(str(tmp_path / "run" / "sae"),), **BRIEF, out=out, limit=1))
    assert "the largest change of a logit is 0" in said
    assert "in place of all MLPs (sae): " in said
    assert np.isfinite(json.loads((out / "replacement.json").read_text())["sae"]["kl_recovered"])


def test_a_sweep_over_the_mlps_trains_a_set_with_skips(tmp_path: Path):
    run(train_sae, small(tmp_path, form="skip", sweep=("layer=0,1",)))
    found = sae.load_transcoders(tmp_path / "sae")
    assert (found.n_layers, found.d_sae, found.crosses, found.skips) == (2, 64, False, True)
    sae.save_transcoders(found, tmp_path / "set")
    assert sae.load_transcoders(tmp_path / "set").metadata["model_name"] == "tiny-random"
    assert sae.load(tmp_path / "sae" / f"{ENDS[0][1]}-to-{ENDS[1][1]}").writes == (CONFIG.d_model,)


def test_the_axis_mlp_is_a_pair_of_sites():
    config = settings.RunConfig(sweep=("mlp=0,2",), form="batchtopk")
    members = sweeps.make_members(config, sweeps.combinations(config), places.in_model(CONFIG), ENDS[0][0])
    assert [str(each.place) for each in members] == [f"{ENDS[0][layer]}-to-{ENDS[1][layer]}" for layer in (0, 2)]
    made = [runs.make_module(each, 4, CONFIG.d_model) for each in members]
    assert [each.apply_b_dec_to_input for each in made] == [False, False]
    config = settings.RunConfig(sweep=("mlp_in=1",), form="batchtopk")
    (behind,) = sweeps.make_members(config, sweeps.combinations(config), places.in_model(CONFIG), ENDS[0][0])
    assert str(behind.place) == f"blocks.1.mlp.hook_in-to-{ENDS[1][1]}"


SMALL = tiny.model().config


def zeros(layer: int, d_sae: int = 8) -> Dictionary:
    """A transcoder that writes nothing."""
    module = sae.ReLU.init(d_model=SMALL.d_model, d_sae=d_sae, d_out=SMALL.d_model, key=jax.random.key(layer))
    module = jax.tree.map(jnp.zeros_like, module)
    return Dictionary(f"mlp{layer}", module, Place((ENDS[0][layer],), (ENDS[1][layer],)))


def test_in_place_of_all_mlps_each_reads_what_those_before_it_left():
    model, tokens = tiny.model(), list(range(5, 17))
    module = sae.ReLU.init(d_model=SMALL.d_model, d_sae=8, d_out=SMALL.d_model, key=jax.random.key(0))
    later = Dictionary("later", module, zeros(1).place)
    made = splicing._in_turn(model, [later, zeros(0)], tokens)
    edits = [qwen_eqx.Ablate(site=ENDS[1][0])]
    acts = model.run_with_capture(tokens, [ENDS[0][1]], edits=edits, logits=None)[1]
    expected = module(acts[ENDS[0][1]])
    np.testing.assert_allclose(made[ENDS[1][1]].value[: len(tokens)], expected, rtol=1e-4, atol=1e-4)
    whole = [zeros(layer) for layer in range(SMALL.layers)]
    found = splicing.replaced(model, whole, [tokens])
    np.testing.assert_allclose(found["ce_sae"], found["ce_zero"], rtol=1e-6)
    sets = splicing.replacing(SMALL, [*whole, Dictionary("other", module, Place((ENDS[0][0],), (ENDS[0][0],)))])
    assert {name: len(each) for name, each in sets.items()} == {"all": SMALL.layers}
    assert splicing.replacing(SMALL, whole[1:]) == {}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"form": "skip", "site": ENDS[0][0]}, "--target-site: found none, expected one: a skip writes a later site"),
        (
            {"form": "clt", "site": f"{ENDS[0][0]}+{ENDS[0][1]}:{ENDS[1][0]}"},
            "--target-site: found 1 sites, expected 2",
        ),
        ({"form": "clt", "site": f"{ENDS[0][0]}+{ENDS[0][1]}:{ENDS[1][1]}+{ENDS[1][0]}"}, "computes before"),
        ({"form": "clt", "sweep": ("mlp=0", "site=a")}, "--sweep: found mlp beside another axis of places"),
        ({"form": "skip", "sweep": ("mlp=0", "mlp_in=1")}, "--sweep: found mlp beside another axis of places"),
    ],
)
def test_places_that_no_transcoder_has_are_refused(fields, said):
    config = settings.RunConfig(**fields)
    with pytest.raises(InputError, match=said):
        sweeps.make_members(config, sweeps.combinations(config), places.in_model(CONFIG), "")


def test_a_store_that_holds_no_mlp_has_no_place_for_one():
    assert places.default_held(("blocks.1.hook_resid_post", ENDS[1][1]), sae.CLT) is None
    assert places.default_held((ENDS[1][1], ENDS[0][1], ENDS[1][0]), sae.CLT) == f"{ENDS[0][1]}:{ENDS[1][1]}"
    assert places.default_held(("a", "b"), sae.TopK) == "a"
