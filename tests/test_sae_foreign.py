"""Foreign SAE files give what their own library computed from them; what is wrong or unknown is refused in one line."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import sae
import tolerances

FIXTURES = Path(__file__).parent / "fixtures" / "sae"
EXPECTED = {  # directory -> form, metadata's hook_name
    "saelens/standard": (sae.ReLU, "blocks.1.hook_resid_post"),
    "saelens/standard_unsubtracted": (sae.ReLU, "blocks.1.hook_resid_post"),
    "saelens/topk": (sae.TopK, "blocks.1.hook_resid_post"),
    "saelens/topk_rescaled": (sae.TopK, "blocks.1.hook_resid_post"),
    "saelens/jumprelu": (sae.JumpReLU, "blocks.1.hook_resid_post"),
    "saelens/gated": (sae.Gated, "blocks.1.hook_resid_post"),
    "saelens/transcoder": (sae.ReLU, "blocks.1.hook_resid_post"),
    "saelens/jumprelu_transcoder": (sae.JumpReLU, "blocks.1.hook_resid_post"),
    "saelens/batchtopk": (sae.BatchTopK, "blocks.1.hook_resid_post"),
    "saelens/batchtopk_checkpoint": (sae.BatchTopK, "blocks.1.hook_resid_post"),
    "saelens/matryoshka": (sae.Matryoshka, "blocks.1.hook_resid_post"),
    "saelens/matryoshka_checkpoint": (sae.Matryoshka, "blocks.1.hook_resid_post"),
    "sparsify/autoencoder/layers.3": (sae.TopK, "blocks.3.hook_resid_post"),
    "sparsify/transcoder/layers.3": (sae.TopK, "blocks.3.hook_resid_post"),
    "dictionary_learning/AutoEncoder": (sae.ReLU, "blocks.3.hook_resid_post"),
    "dictionary_learning/AutoEncoderNew": (sae.ReLU, "blocks.3.hook_resid_post"),
    "dictionary_learning/AutoEncoderTopK": (sae.TopK, "blocks.3.hook_resid_post"),
    "dictionary_learning/BatchTopKSAE": (sae.BatchTopK, "blocks.3.hook_resid_post"),
    "dictionary_learning/GatedAutoEncoder": (sae.Gated, "blocks.3.hook_resid_post"),
    "dictionary_learning/JumpReluAutoEncoder": (sae.JumpReLU, "blocks.3.hook_resid_post"),
    "dictionary_learning/MatryoshkaBatchTopKSAE": (sae.Matryoshka, "blocks.3.hook_resid_post"),
    "gemma_scope/layer_1/width_16/average_l0_4": (sae.JumpReLU, None),
    "gemma_scope/resid_post/layer_2_width_16_l0_small": (sae.JumpReLU, "blocks.2.hook_resid_post"),
    "qwen_scope/SAE-Res-Tiny-W16K-L0_3": (sae.TopK, "blocks.2.hook_resid_post"),
}


def test_every_fixture_is_in_the_table():
    assert {str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.rglob("golden.safetensors")} == set(EXPECTED)
    assert set(json.loads((FIXTURES / "versions.json").read_text())) >= {"torch", "sae-lens", "dictionary-learning"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_foreign_sae_computes_what_its_library_computed(name):
    form, hook = EXPECTED[name]
    golden = safetensors.numpy.load_file(FIXTURES / name / "golden.safetensors")
    module, metadata, density = sae.load_with_metadata(FIXTURES / name)
    assert type(module) is form
    assert metadata.get("hook_name") == hook
    assert (density is not None) == (name == "saelens/topk")
    assert (module.d_model, module.d_sae, module.d_out) == (6, 16, golden["y"].shape[1])
    z = np.asarray(module.encode(jnp.asarray(golden["x"])))
    np.testing.assert_array_equal(z > 0, golden["z"] > 0)
    np.testing.assert_allclose(z, golden["z"], **tolerances.CONVERTED)
    np.testing.assert_allclose(module.decode(jnp.asarray(golden["z"])), golden["y"], **tolerances.CONVERTED)
    np.testing.assert_allclose(module(jnp.asarray(golden["x"])), golden["y"], **tolerances.CONVERTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_foreign_sae_saved_here_loads_as_the_same_module(tmp_path, name):
    module, metadata, density = sae.load_with_metadata(FIXTURES / name)
    sae.save(module, tmp_path, metadata, density=density)
    again = sae.load_with_metadata(tmp_path)
    assert type(again.module) is type(module)
    assert jax.tree.structure(again.module) == jax.tree.structure(module)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again.module), jax.tree.leaves(module))
    kept = metadata.keys() - {"sae_lens_version", "training_architecture_details"}
    assert {field: again.metadata[field] for field in kept} == {field: metadata[field] for field in kept}
    if density is not None:
        np.testing.assert_allclose(again.density, density, rtol=1e-5)


def edit(path: Path, **fields) -> None:
    config = json.loads(path.read_text())
    config.get("trainer", config).update(fields)
    path.write_text(json.dumps(config))


def config(**fields):
    return lambda directory: edit(directory / "cfg.json", **fields)


def weights(drop: tuple[str, ...] = (), **tensors):
    def change(directory):
        stored = {**safetensors.numpy.load_file(directory / "sae.safetensors"), **tensors}
        kept = {name: np.ascontiguousarray(tensor) for name, tensor in stored.items() if name not in drop}
        safetensors.numpy.save_file(kept, directory / "sae.safetensors")

    return change


ZEROS = np.zeros((16, 6), np.float32)
SPARSIFY, DICTIONARY = "sparsify/autoencoder/layers.3", "dictionary_learning/BatchTopKSAE"
GEMMA, QWEN = "gemma_scope/layer_1/width_16/average_l0_4", "qwen_scope/SAE-Res-Tiny-W16K-L0_3"
BROKEN = {
    "groupmax": (SPARSIFY, config(activation="groupmax"), "activation: found 'groupmax'"),
    "skip connection": (SPARSIFY, config(skip_connection=True), "skip_connection: found True"),
    "n-gram table": (SPARSIFY, config(gram_lookup=True), "gram_lookup: found True"),
    "no k": (SPARSIFY, config(k=None), "k: found None"),
    "k is a text": (SPARSIFY, config(k="3"), "k: found '3'"),
    "k beyond d_sae": (SPARSIFY, config(k=17), "k: found 17"),
    "config is a list": (SPARSIFY, lambda d: (d / "cfg.json").write_text("[]"), "found list"),
    "config is gone": (SPARSIFY, lambda d: (d / "cfg.json").unlink(), "cannot be read"),
    "no decoder": (SPARSIFY, weights(("W_dec",)), "W_dec: missing"),
    "an extra matrix": (SPARSIFY, weights(W_skip=ZEROS), "W_skip: unexpected"),
    "a transposed decoder": (SPARSIFY, weights(W_dec=ZEROS.T), "W_dec: found shape"),
    "a vector for a matrix": (SPARSIFY, weights(W_dec=ZEROS[0]), "two matrices"),
    "whole numbers": (
        SPARSIFY, weights(b_dec=np.zeros(6, np.int32)), "b_dec: found int32"),
    "NaN": (SPARSIFY, weights(W_dec=ZEROS * np.nan), "W_dec: found NaN"),
    "weights are a pointer": (SPARSIFY, lambda d: (d / "sae.safetensors").write_text("version"), "no valid"),
    "an unknown dictionary": (DICTIONARY, lambda d: edit(d / "config.json", dict_class="CrossCoder"), "'CrossCoder'"),
    "an ambiguous dictionary": (DICTIONARY, lambda d: (d / "config.json").unlink(), "AutoEncoderTopK from"),
    "ae.pt is text": (DICTIONARY, lambda d: (d / "ae.pt").write_text("hello"), "found no zip"),
    "npz is text": (GEMMA, lambda d: (d / "params.npz").write_text("hello"), "found no npz"),
    "npz of objects": (
        GEMMA, lambda d: np.savez(d / "params.npz", W_enc=np.array([{}], dtype=object)), "no npz of plain arrays"),
    "npz without threshold": (GEMMA, lambda d: np.savez(d / "params.npz", W_enc=ZEROS.T), "threshold: missing"),
    "no k in the name": (QWEN, lambda d: d.rename(d.parent / "unnamed"), "k: found none"),
    "two layers": (QWEN, lambda d: shutil.copy(d / "layer2.sae.pt", d / "layer3.sae.pt"), "found 2 *.sae.pt"),
    "nothing known": (QWEN, lambda d: (d / "layer2.sae.pt").unlink(), "no other known SAE"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_foreign_sae_is_refused_in_one_line(tmp_path, name):
    source, breaks, expected = BROKEN[name]
    directory = tmp_path / Path(source).name
    shutil.copytree(FIXTURES / source, directory)
    breaks(directory)
    if not directory.exists():
        directory = tmp_path / "unnamed"
    with pytest.raises(sae.InputError) as error:
        sae.load(directory)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


def test_k_of_a_qwen_scope_file_may_be_given(tmp_path):
    shutil.copy(FIXTURES / QWEN / "layer2.sae.pt", tmp_path / "layer2.sae.pt")
    assert sae.load(tmp_path / "layer2.sae.pt", k=2).k == 2
    assert sae.load(FIXTURES / QWEN / "layer2.sae.pt").k == 3
    for other in ("dictionary_learning/AutoEncoder/ae.pt", SPARSIFY, "saelens/jumprelu"):
        with pytest.raises(sae.InputError, match="k: found 2, expected none"):
            sae.load(FIXTURES / other, k=2)


def test_classes_are_told_by_their_tensors_where_only_one_fits(tmp_path):
    for name in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        (tmp_path / name).mkdir()
        shutil.copy(FIXTURES / "dictionary_learning" / name / "ae.pt", tmp_path / name / "ae.pt")
        assert type(sae.load(tmp_path / name / "ae.pt")) is EXPECTED[f"dictionary_learning/{name}"][0]
