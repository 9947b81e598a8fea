"""The native directory: every form comes back as it was, SAELens computes the same from it, and damage is refused."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import sae
import strategies
import tolerances
from sae.errors import DiskFull

ONE_SITE = [name for name, form in sae.FORMS.items() if not form.several_sites]  # the others: test_sae_crosscoder

FIXTURES = Path(__file__).parent / "fixtures" / "sae" / "saelens"
METADATA = {"model_name": "tiny-random", "hook_name": "blocks.2.hook_resid_post", "run": {"lr": 0.1, "tasks": ["a"]}}


def trained(form: str, d_out: int | None = None, seed: int = 0) -> sae.AbstractSAE:
    """A module of a form whose every parameter has moved from where init puts it."""
    extra = {"k": 3} if "k" in sae.FORMS[form].details else {}
    key = jax.random.key(seed)
    module = sae.FORMS[form].init(d_model=6, d_sae=16, d_out=d_out, key=key, **extra)
    leaves, structure = jax.tree.flatten(module)
    keys = jax.random.split(key, len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(each, leaf.shape) for each, leaf in zip(keys, leaves, strict=True)]
    module = jax.tree.unflatten(structure, moved)
    if hasattr(module, "threshold"):
        module = eqx.tree_at(lambda m: m.threshold, module, jnp.abs(module.threshold) + 0.1)
    return module


def same(one: sae.AbstractSAE, other: sae.AbstractSAE) -> None:
    assert type(one) is type(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one), jax.tree.leaves(other))


@given(st.sampled_from(sorted(ONE_SITE)), st.sampled_from([None, 5, 6]), st.integers(0, 99), strategies.json_objects())
def test_every_form_comes_back_as_it_was_saved(tmp_path_factory, form, d_out, seed, metadata):
    directory = tmp_path_factory.mktemp("sae")
    module = trained(form, d_out, seed)
    density = np.random.default_rng(seed).random(16, np.float32)
    sae.save(module, directory, metadata, density=density)
    loaded = sae.load_with_metadata(directory)
    same(loaded.module, module)
    assert {name: loaded.metadata[name] for name in metadata} == metadata
    np.testing.assert_allclose(loaded.density, density, **tolerances.CONVERTED)


@pytest.mark.parametrize("form", ONE_SITE)
def test_a_fresh_module_comes_back_too(tmp_path, form):
    extra = {"k": 3} if "k" in sae.FORMS[form].details else {}
    module = sae.FORMS[form].init(d_model=6, d_sae=16, key=jax.random.key(0), **extra)
    rows = jax.random.normal(jax.random.key(1), (50, 6))
    if hasattr(module, "with_threshold"):
        with pytest.raises(sae.InputError, match=r"threshold: found none learned.*with_threshold"):
            sae.save(module, tmp_path / "no", {})
        assert not (tmp_path / "no").exists()
        module = module.with_threshold(rows)
        assert int((module.encode(rows) > 0).sum()) == 3 * 50  # what the batch's rule keeps of these rows
    sae.save(module, tmp_path, {})
    same(sae.load(str(tmp_path)), module)
    assert sae.load_with_metadata(tmp_path).density is None


def test_saving_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    before = trained("relu")
    sae.save(before, tmp_path, METADATA, density=np.full(16, 0.5, np.float32))
    with pytest.raises(sae.InputError, match=r"density: found shape \(15,\), expected \(16,\)"):
        sae.save(trained("topk"), tmp_path, METADATA, density=np.ones(15, np.float32))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for density in (None, np.ones(16, np.float32)):
            with pytest.raises(DiskFull):
                sae.save(trained("topk"), tmp_path, METADATA, density=density)
    loaded = sae.load_with_metadata(tmp_path)
    same(loaded.module, before)
    np.testing.assert_allclose(loaded.density, 0.5, **tolerances.CONVERTED)


def test_saving_again_leaves_nothing_of_what_was_there(tmp_path):
    sae.save(trained("batchtopk"), tmp_path, METADATA, density=np.ones(16, np.float32))
    (tmp_path / "notes.txt").write_text("mine")
    _, metadata, _ = sae.load_with_metadata(tmp_path)
    sae.save(trained("jumprelu"), tmp_path, metadata)
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors", "notes.txt"}
    loaded = sae.load_with_metadata(tmp_path)
    same(loaded.module, trained("jumprelu"))
    assert "training_architecture" not in loaded.metadata  # a JumpReLU is no BatchTopK because it once was one


def test_the_same_module_gives_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        sae.save(trained("gated"), tmp_path / name, METADATA)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}


def test_thresholds_edited_apart_are_a_jumprelu(tmp_path):
    sae.save(trained("batchtopk"), tmp_path, METADATA)
    weights = safetensors.numpy.load_file(tmp_path / "sae_weights.safetensors")
    weights["threshold"][0] += 1
    safetensors.numpy.save_file(weights, tmp_path / "sae_weights.safetensors")
    edit(tmp_path, weights_digest="none")
    module = sae.load(tmp_path)
    assert type(module) is sae.JumpReLU
    np.testing.assert_array_equal(module.threshold, weights["threshold"])


def test_a_fractional_k_of_saelens_is_a_jumprelu(tmp_path):
    shutil.copytree(FIXTURES / "batchtopk", tmp_path / "b")
    config = json.loads((tmp_path / "b/cfg.json").read_text())
    config["metadata"]["training_architecture_details"]["k"] = 2.5
    (tmp_path / "b/cfg.json").write_text(json.dumps(config))
    assert type(sae.load(tmp_path / "b")) is sae.JumpReLU


@pytest.mark.parametrize("widths", [[4, "x"], [8, 4], [True], [0, 4], [4, 32], "ab", None], ids=str)
def test_widths_that_are_none_are_refused(tmp_path, widths):
    shutil.copytree(FIXTURES / "matryoshka_checkpoint", tmp_path / "m")
    edit(tmp_path / "m", matryoshka_widths=widths)
    with pytest.raises(sae.InputError, match="widths: found"):
        sae.load(tmp_path / "m")


def test_a_directory_of_before_version_6_loads(tmp_path):
    shutil.copytree(FIXTURES / "topk", tmp_path / "old")
    legacy = {
        "d_in": 6, "d_sae": 16, "dtype": "torch.float32", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3},
        "hook_point": "blocks.1.hook_resid_post", "model_name": "gpt2-small", "normalize_activations": False,
        "finetuning_scaling_factor": False,
    }  # fmt: skip
    (tmp_path / "old/cfg.json").write_text(json.dumps(legacy))
    weights = safetensors.numpy.load_file(tmp_path / "old/sae_weights.safetensors")
    weights["scaling_factor"] = np.ones(16, np.float32)
    safetensors.numpy.save_file(weights, tmp_path / "old/sae_weights.safetensors")
    module, metadata, _ = sae.load_with_metadata(tmp_path / "old")
    same(module, sae.load(FIXTURES / "topk"))
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert metadata["model_name"] == "gpt2-small"


def edit(directory: Path, **fields) -> None:
    path = directory / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def weights(**tensors):
    def change(directory: Path) -> None:
        path = directory / "sae_weights.safetensors"
        stored = safetensors.numpy.load_file(path) | tensors
        safetensors.numpy.save_file({name: each for name, each in stored.items() if each is not None}, path)
        edit(directory, weights_digest="none")

    return change


def config(**fields):
    return lambda directory: edit(directory, **fields)


BROKEN = {
    "an unknown architecture": (config(architecture="temporal"), "architecture: found 'temporal'"),
    "a skip transcoder": (config(architecture="skip_transcoder"), "architecture: found 'skip_transcoder'"),
    "layer norm": (config(normalize_activations="layer_norm"), "normalize_activations: found 'layer_norm'"),
    "unfolded scaling": (config(normalize_activations="expected_average_only_in"), "normalize_activations: found"),
    "another d_in": (config(d_in=7), "d_in: found 7, expected 6"),
    "another d_sae": (config(d_sae=8), "d_sae: found 8, expected 16"),
    "no k": (config(k=None), "k: found None"),
    "k is a half": (config(k=2.5), "k: found 2.5"),
    "k is negative": (config(k=-1), "k: found -1"),
    "a legacy activation": (config(metadata={}, activation_fn="tanh-relu"), "activation_fn: found 'tanh-relu'"),
    "a fine-tuned scale": (config(finetuning_scaling_factor=True), "finetuning_scaling_factor: found True"),
    "config cut short": (lambda d: (d / "cfg.json").write_text('{"architecture":'), "no valid JSON"),
    "no config": (lambda d: (d / "cfg.json").unlink(), "cannot be read"),
    "a version that is none": (config(metadata={"sae_lens_version": "dev"}), "metadata.sae_lens_version: found 'dev'"),
    "a flipped bit": (lambda d: flip(d / "sae_weights.safetensors"), "digest"),
    "weights of another save": (weights(W_enc=np.zeros((6, 16), np.float32), b_enc=None), "b_enc: missing"),
    "a scale factor": (weights(scaling_factor=np.full(16, 2, np.float32)), "scaling_factor: found values other than 1"),
    "a stranger": (weights(W_skip=np.zeros((6, 6), np.float32)), "W_skip: unexpected"),
    "infinity": (weights(b_dec=np.full(6, np.inf, np.float32)), "b_dec: found NaN or infinity"),
    "two problems": (weights(b_dec=np.zeros(5, np.float32), b_enc=np.zeros(4, np.float32)), "b_enc: found shape (4,)"),
    "densities too few": (
        lambda d: safetensors.numpy.save_file({"sparsity": np.zeros(4, np.float32)}, d / "sparsity.safetensors"),
        "expected one tensor sparsity"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_refused_in_one_line(tmp_path, name):
    breaks, expected = BROKEN[name]
    sae.save(trained("topk"), tmp_path / "broken", METADATA)
    breaks(tmp_path / "broken")
    with pytest.raises(sae.InputError, match=re.escape(expected)) as error:
        sae.load(tmp_path / "broken")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "broken") in str(error.value)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    module = trained("relu")
    broken = eqx.tree_at(lambda m: m.b_dec, module, module.b_dec.at[0].set(jnp.nan))
    with pytest.raises(sae.InputError, match="b_dec: found NaN"):
        sae.save(broken, tmp_path / "new", METADATA)
    with pytest.raises(sae.InputError, match="JSON cannot hold"):
        sae.save(module, tmp_path / "new", {"object": {1, 2}})
    keys = jax.random.split(jax.random.key(0), 2)
    sweep = eqx.filter_vmap(lambda key: sae.ReLU.init(d_model=6, d_sae=16, key=key))(keys)
    with pytest.raises(sae.InputError, match="expected one SAE"):
        sae.save(sweep, tmp_path / "new", METADATA)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(sae.InputError, match="found a file"):
        sae.save(module, tmp_path / "file", METADATA)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.peer
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("d_out", [None, 5], ids=["autoencoder", "transcoder"])
@pytest.mark.parametrize("form", ONE_SITE)
def test_saelens_encodes_and_decodes_what_is_saved_here_alike(tmp_path, form, d_out):
    lens = pytest.importorskip("sae_lens")
    torch = pytest.importorskip("torch")
    if d_out is not None and form in {"topk", "gated"}:
        pytest.skip("SAELens has no such transcoder")
    module = trained(form, d_out)
    sae.save(module, tmp_path, METADATA, density=np.full(16, 0.1, np.float32))
    theirs = lens.SAE.load_from_disk(tmp_path)
    x = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    with torch.no_grad():
        z = theirs.encode(torch.from_numpy(x))
        y = theirs.decode(z)
    np.testing.assert_allclose(module.encode(jnp.asarray(x)), z.numpy(), **tolerances.CONVERTED)
    np.testing.assert_allclose(module(jnp.asarray(x)), y.numpy(), **tolerances.CONVERTED)
    assert theirs.cfg.metadata.hook_name == METADATA["hook_name"]
    theirs.save_model(tmp_path / "theirs")  # and what SAELens writes from it comes back as the same module
    same(sae.load(tmp_path / "theirs"), module)
