"""Transcoders of all MLPs as rows: what they compute is what the dictionaries do, and widths that do not fit are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae

RULES = ("relu", "jumprelu", "topk", "gated")  # a threshold, one for each latent, a number of latents, two paths


def trained(form: str, seed: int, d_model: int = 6, d_sae: int = 12) -> sae.AbstractSAE:
    """A transcoder as training leaves one: random biases and thresholds, folded to the units of raw activations."""
    rng = np.random.default_rng(seed)
    extra = {"k": 3} if "k" in sae.FORMS[form].details else {}
    module = sae.FORMS[form].init(d_model=d_model, d_sae=d_sae, d_out=d_model, key=jax.random.key(seed), **extra)
    assert isinstance(module, sae.AbstractSAE)
    names = [name for name in ("b_enc", "b_dec", "b_mag", "r_mag", "threshold", "skip") if hasattr(module, name)]
    new = {name: 0.3 * np.abs(rng.normal(size=getattr(module, name).shape)) for name in names}
    module = dataclasses.replace(module, **{name: jnp.asarray(value, jnp.float32) for name, value in new.items()})
    mean, mean_out = jnp.asarray(rng.normal(size=(2, d_model)), jnp.float32)
    folded = module.fold(jnp.float32(2.0), mean, jnp.float32(0.5), mean_out)
    assert isinstance(folded, sae.AbstractSAE)
    return folded


def written(found: sae.Transcoders, x: np.ndarray) -> np.ndarray:
    """What the set adds to each MLP's output, by its rows alone; x is [layers, pos, d_model]."""
    out = np.stack([np.broadcast_to(found.bias(layer), x[layer].shape) for layer in range(found.n_layers)])
    for layer in range(found.n_layers):
        z = np.asarray(found.encode(layer, jnp.asarray(x[layer])))
        active = np.flatnonzero(z.any(axis=0))
        rows = np.asarray(found.decoder_rows(layer, active))
        out[layer : layer + rows.shape[1]] += np.einsum("pn,nod->opd", z[:, active], rows)
        if (skip := found.skip(layer)) is not None:
            out[layer] += x[layer] @ np.asarray(skip)
    return out


@pytest.mark.parametrize("form", RULES)
def test_rows_compute_what_the_dictionaries_do(form):
    modules = [trained(form, layer) for layer in range(2)]
    found = sae.Transcoders.of(modules)
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    expected = np.stack([module(jnp.asarray(rows)) for module, rows in zip(modules, x, strict=True)])
    np.testing.assert_allclose(written(found, x), expected, atol=1e-4)
    for layer, rows in enumerate(x):
        z = np.asarray(found.encode(layer, jnp.asarray(rows)))
        np.testing.assert_allclose(z, modules[layer].encode(jnp.asarray(rows)), atol=1e-4)
        positions, latents = np.nonzero(z)
        weights, biases = map(np.asarray, found.encoder_rows(layer, latents))
        np.testing.assert_allclose((weights * rows[positions]).sum(-1) + biases, z[positions, latents], atol=1e-4)


def test_the_embedded_transcoders_are_one_set():
    found = sae.load_transcoders("tiny-arc")
    assert (found.n_layers, found.d_model, found.d_sae) == (6, 128, 768)
    assert (found.input_site, found.output_site) == ("hook_resid_mid", "hook_mlp_out")
    assert found.metadata["model_name"] == "tiny-arc"
    module = sae.load("tiny-arc/blocks.2.hook_resid_mid-to-blocks.2.hook_mlp_out")
    x = jax.random.normal(jax.random.key(0), (4, 128)) * 3
    np.testing.assert_allclose(found.encode(2, x), module.encode(x), atol=1e-4)
    assert "n_layers=6, d_model=128, d_sae=768" in repr(found)


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda one: sae.Transcoders.of([]), "transcoders: found none"),
        (lambda one: sae.Transcoders.of([one, trained("relu", 1, d_sae=8)]), r"layer 1: found an encoder \(8, 6\)"),
        (lambda one: sae.Transcoders.of([one]).encode(1, jnp.ones((2, 6))), "layer: found 1, expected 0 to 0"),
        (lambda one: sae.Transcoders.of([one]).decoder_rows(0, np.array([12])), "latents: found 12 to 12, expected 0 to 11"),
        (
            lambda one: sae.Transcoders.of([sae.BatchTopK.init(d_model=6, d_sae=12, d_out=6, k=2, key=jax.random.key(0))]),
            "threshold: found none learned",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(attempt, said):
    with pytest.raises(sae.InputError, match=said):
        attempt(trained("relu", 0))


def test_a_directory_without_one_for_every_block_is_refused(tmp_path):
    for layer in (0, 2):
        site = f"blocks.{layer}.hook"
        metadata = {"hook_name": f"{site}_resid_mid", "hook_name_out": f"{site}_mlp_out"}
        sae.save(trained("relu", layer), tmp_path / str(layer), metadata)
    with pytest.raises(sae.InputError, match="found no transcoder of block 1"):
        sae.load_transcoders(tmp_path)
    with pytest.raises(sae.InputError, match="found no such file or directory"):
        sae.load_transcoders(tmp_path / "3")
