"""Latents as SAEDashboard's JSON: its fields, values that are those of the documents, and its own reader where installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_eqx
import sae
import tiny
from qwen_lab import Data, Dictionary, Place, corpus, dashboards, lens
from solving import made_task

# of sae-dashboard 0.8.0
BATCH = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
    "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations", "vector",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The batch of a random dictionary whose rows are those of two short documents."""
    model, (_, tokenizer) = tiny.model(), qwen_eqx.from_pretrained("tiny-random")
    module = sae.TopK.init(d_model=model.config.d_model, d_sae=24, k=4, key=jax.random.key(0))
    documents = corpus.documents([made_task("a"), made_task("b")], tokenizer, max_tokens=512)
    rng = np.random.default_rng(0)
    acts = [{SITE: jnp.asarray(rng.normal(size=(len(d.tokens), model.config.d_model)), jnp.float32)} for d in documents]
    data = Data(model, tokenizer, "m", documents, acts)
    (path,) = dashboards.write(
        tmp_path_factory.mktemp("np"), Dictionary("mine", module, Place((SITE,), (SITE,))), data, 2
    )
    codes = [sae.encoded(module, rows[SITE]) for rows in acts]
    return {"batch": json.loads(path.read_text()), "codes": np.concatenate(codes), "path": path}


def test_a_batch_has_the_fields_of_its_schema(written: dict):
    batch, codes = written["batch"], written["codes"]
    assert set(batch) == BATCH
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("m", 1, "mine")
    assert [each["feature_index"] for each in batch["features"]] == np.flatnonzero(codes.any(axis=0)).tolist()
    for each in batch["features"]:
        assert set(each) == FEATURE
        assert each["frac_nonzero"] == pytest.approx(np.mean(codes[:, each["feature_index"]] > 0))
        assert sum(each["freq_hist_data_bar_heights"]) == np.sum(codes[:, each["feature_index"]] > 0)
        assert len(each["pos_str"]) == len(each["neg_values"]) == dashboards.TOKENS
        assert each["pos_values"] == sorted(each["pos_values"], reverse=True)
        assert each["pos_values"][0] >= 0 >= each["neg_values"][0]
        assert all(set(one) == ACTIVATION for one in each["activations"])
        best = each["activations"][0]
        assert best["bin_min"] == best["bin_contains"] == -1
        assert best["values"][best["qualifying_token_index"]] == best["bin_max"] == max(best["values"])


def test_their_own_reader_takes_it(written: dict):
    theirs = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    assert theirs.NeuronpediaDashboardBatch(**written["batch"]).to_dict() == written["batch"]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=300), min_size=1, max_size=3))
@settings(max_examples=30)
def test_an_example_lies_in_its_interval(lines: list[list[float]]):
    values = [np.asarray(line) for line in lines]
    pieces = [[str(n) for n in range(len(line))] for line in lines]
    made = dashboards.feature(3, values, pieces, np.ones(4, np.float32), 2)
    assert bool(made["activations"]) == any(map(any, lines))
    for one in made["activations"]:
        assert len(one["tokens"]) == len(one["values"]) <= dashboards.WINDOW
        at = one["qualifying_token_index"]
        first = int(one["tokens"][0])
        parts = [each[first : first + len(one["values"])].tolist() for each in values]
        assert one["values"] in parts
        assert max(0, one["bin_min"]) - 1e-3 <= one["values"][at] <= one["bin_max"] + 1e-3
        if one["bin_min"] >= 0:
            inside = np.concatenate(values)
            found = np.mean((inside > 0) & (inside >= one["bin_min"] - 1e-3) & (inside <= one["bin_max"] + 1e-3))
            assert one["bin_contains"] == pytest.approx(found, abs=1e-5)
    empty = dashboards.feature(0, [np.zeros(3)], [["a"] * 3], np.zeros(4, np.float32))
    assert (empty["activations"], empty["freq_hist_data_bar_heights"], empty["frac_nonzero"]) == ([], [], 0.0)


def test_logits_are_left_out_where_the_width_is_not_the_streams():
    model, (_, tokenizer) = tiny.model(), qwen_eqx.from_pretrained("tiny-random")
    assert lens.effects(model, np.ones((2, model.config.d_model + 1), np.float32)) is None
    assert set(map(len, dashboards._logits(None, tokenizer).values())) == {0}
    effects = lens.effects(model, np.zeros((1, model.config.d_model), np.float32))
    assert effects is not None
    assert effects.shape == (1, model.config.vocab)
