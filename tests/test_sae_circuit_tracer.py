"""circuit-tracer's sets: what its own classes wrote and computed, read lazily and written again to the same tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import sae
from sae import files
from sae.formats import circuit_tracer
from test_sae_transcoders import trained, written

FIXTURES = Path(__file__).parent / "fixtures" / "circuit_tracer"
SETS = ("per_layer_relu", "per_layer_jumprelu_skip", "cross_layer_relu", "cross_layer_jumprelu_skip")


def copied(name: str, target: Path) -> Path:
    """A fixture without what its library computed from it."""
    shutil.copytree(FIXTURES / name, target, ignore=shutil.ignore_patterns("golden*"))
    return target


@pytest.mark.parametrize("name", SETS)
def test_circuit_tracers_own_sets_compute_what_they_do_there(name):
    assert set(json.loads((FIXTURES / "versions.json").read_text())) >= {"circuit-tracer", "torch"}
    found = sae.load_transcoders(FIXTURES / name)
    golden = {
        key: np.asarray(value) for key, value in files.map_tensors(FIXTURES / name / "golden.safetensors").items()
    }
    for layer in range(3):
        z = found.encode(layer, jnp.asarray(golden["x"][layer]))
        np.testing.assert_allclose(z, golden["z"][layer], atol=2e-6)
    np.testing.assert_allclose(written(found, golden["x"]), golden["y"], atol=1e-5)
    crosses = name.startswith("cross")
    assert (found.crosses, found.skips, found.n_layers) == (crosses, name.endswith("skip"), 3)
    assert found.input_site == ("hook_resid_mid" if crosses else "mlp.hook_in")
    assert found.metadata == {"model_name": "tiny"}


@pytest.mark.parametrize("name", SETS)
def test_what_is_written_again_are_the_same_tensors(name, tmp_path):
    sae.save_transcoders(sae.load_transcoders(FIXTURES / name), tmp_path / "set")
    assert circuit_tracer.read_config(tmp_path / "set" / "config.yaml") == circuit_tracer.read_config(
        FIXTURES / name / "config.yaml"
    )
    names = {path.name for path in (FIXTURES / name).glob("*.safetensors")} - {"golden.safetensors"}
    assert {path.name for path in (tmp_path / "set").glob("*.safetensors")} == names
    for each in names:
        before, after = (files.map_tensors(folder / each) for folder in (FIXTURES / name, tmp_path / "set"))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype
            np.testing.assert_array_equal(tensor.astype(np.float32), after[key].astype(np.float32))


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    """The matrices are maps of the file: what is written into it after the set was opened is what rows then say."""
    home = copied("per_layer_relu", tmp_path / "set")
    found = sae.load_transcoders(home)
    layer = found.layers[1]
    assert all(_is_mapped(array) for array in (layer.encoder, layer.decoder))
    latents = np.array([3, 11, 3])
    whole = safetensors.numpy.load_file(home / "layer_1.safetensors")
    np.testing.assert_array_equal(found.decoder_rows(1, latents), whole["W_dec"][latents][:, None])
    np.testing.assert_array_equal(found.encoder_rows(1, latents)[0], whole["W_enc"][latents])
    changed = safetensors.numpy.save({**whole, "W_dec": whole["W_dec"] + 1})
    with (home / "layer_1.safetensors").open("r+b") as file:
        file.write(changed)
    np.testing.assert_array_equal(found.decoder_rows(1, latents), whole["W_dec"][latents][:, None] + 1)


def _is_mapped(array: np.ndarray | None) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base if isinstance(array.base, np.ndarray) else None
    return array is not None


@pytest.mark.parametrize("form", ["relu", "jumprelu", "batchtopk"])
def test_dictionaries_trained_here_compute_the_same_when_written(form, tmp_path):
    modules = [trained(form, layer) for layer in range(2)]
    own = sae.Transcoders.of(modules, metadata={"model_name": "tiny-random", "scan": "here"})
    sae.save_transcoders(own, tmp_path / "set")
    found = sae.load_transcoders(tmp_path / "set")
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    np.testing.assert_array_equal(written(found, x), written(own, x))
    assert (found.input_site, found.output_site, found.metadata) == (own.input_site, own.output_site, own.metadata)
    with pytest.raises(sae.InputError, match="found a set or other tensors, expected a new directory"):
        sae.save_transcoders(own, tmp_path / "set")


def test_forms_and_sites_that_circuit_tracer_has_not_are_not_written(tmp_path):
    with pytest.raises(sae.InputError, match="found a TopK or Gated one"):
        sae.save_transcoders(sae.Transcoders.of([trained("topk", 0)]), tmp_path)
    with pytest.raises(sae.InputError, match="output_site: found hook_resid_post"):
        sae.save_transcoders(sae.Transcoders.of([trained("relu", 0)], output_site="hook_resid_post"), tmp_path)


def told(text: str) -> Callable[[Path], object]:
    return lambda home: (home / "config.yaml").write_text(text.replace("  ", "\n"))


def tensors(name: str, **changed: np.ndarray | None) -> Callable[[Path], None]:
    """Puts other tensors into a file, or takes them out of it."""

    def change(home: Path) -> None:
        kept = {**safetensors.numpy.load_file(home / name), **changed}
        safetensors.numpy.save_file({key: value for key, value in kept.items() if value is not None}, home / name)

    return change


def gone(name: str) -> Callable[[Path], None]:
    return lambda home: (home / name).unlink()


HOOKS = "feature_input_hook: mlp.hook_in  feature_output_hook: mlp.hook_out"
PER_LAYER = f"model_kind: transcoder_set  {HOOKS}"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (SETS[0], told("model_kind: sparse_mlp"), "config.yaml: model_kind: found 'sparse_mlp', expected transcoder_set or"),
        (SETS[0], told("[]"), "config.yaml: found list, expected fields"),
        (SETS[0], told("a: [1"), "config.yaml: found no valid YAML"),
        (SETS[0], told("a: !!python/object:os.system {}"), "config.yaml: found no valid YAML"),
        (SETS[0], told("model_kind: transcoder_set"), "feature_input_hook: found None, expected one of hook_resid_mid"),
        (SETS[0], told(PER_LAYER.replace("hook_in", "hook_inn")), "feature_input_hook: found 'mlp.hook_inn', expected"),
        (SETS[0], told(f"{PER_LAYER}  transcoders: layer_0"), "transcoders: found 'layer_0', expected a list"),
        (SETS[0], told(f"{PER_LAYER}  transcoders: [../a.safetensors]"), "found '../a.safetensors', expected a safetensors"),
        (SETS[0], told(f"{PER_LAYER}  transcoders: ['hf://a/b/c.npz']"), "found 'hf://a/b/c.npz', expected a safetensors"),
        (SETS[0], gone("layer_1.safetensors"), "found 2 files layer_.* and no layer_1.safetensors, expected every layer"),
        (SETS[2], gone("W_enc_0.safetensors"), "found 2 files W_enc_.* and no W_enc_0.safetensors"),
        (SETS[2], gone("W_dec_1.safetensors"), "W_dec_1.safetensors: cannot be read"),
        (SETS[0], tensors("layer_1.safetensors", W_enc=np.ones((16, 5), np.float32)), r"W_dec: found shape \(16, 6\)"),
        (SETS[0], tensors("layer_1.safetensors", b_enc=None), "layer_1.safetensors: b_enc: missing"),
        (SETS[0], tensors("layer_1.safetensors", log_thresholds=np.ones(16, np.float32)), "log_thresholds: unexpected"),
        (SETS[0], tensors("layer_1.safetensors", b_enc=np.ones(16, np.int32)), "b_enc: found int32, expected floating"),
        (SETS[2], tensors("W_dec_1.safetensors", W_dec_1=np.ones((16, 3, 6), np.float32)), r"expected \(16, 2, 6\)"),
        (
            SETS[0],
            tensors(
                "layer_2.safetensors",
                W_enc=np.ones((8, 6), np.float32), W_dec=np.ones((8, 6), np.float32), b_enc=np.ones(8, np.float32),
            ),
            r"layer 2: found an encoder \(8, 6\)",
        ),
    ],
)  # fmt: skip
def test_a_set_that_is_not_whole_is_refused_in_one_line(name, change, said, tmp_path):
    home = copied(name, tmp_path / "set")
    change(home)
    with pytest.raises(sae.InputError, match=said) as caught:
        sae.load_transcoders(home)
    assert "\n" not in str(caught.value)


def test_files_are_found_under_the_names_that_the_configuration_gives_them(tmp_path):
    home = copied(SETS[0], tmp_path / "set")
    names = [
        "hf://org/repository/layer_2.safetensors?revision=main",
        "layer_1.safetensors",
        "hf://o/r/f/layer_0.safetensors",
    ]
    told(f"{PER_LAYER}  transcoders: {json.dumps(names)}")(home)
    found, before = sae.load_transcoders(home), sae.load_transcoders(FIXTURES / SETS[0])
    for layer in range(3):
        np.testing.assert_array_equal(found.bias(layer), before.bias(2 - layer))
    told(f"{PER_LAYER}  transcoders: [layer_1.safetensors, layer_1.safetensors]")(home)
    with pytest.raises(sae.InputError, match="found the same file twice"):
        sae.load_transcoders(home)


def test_a_set_at_a_hub_id_is_fetched_as_its_configuration_says(tmp_path, monkeypatch):
    asked = []
    copied(SETS[0], tmp_path / "org" / "sets" / "small")
    copied(SETS[0], tmp_path / "org" / "named")
    addresses = json.dumps([f"hf://org/sets/small/layer_{layer}.safetensors?revision=v2" for layer in (2, 1, 0)])
    told(f"{PER_LAYER}  transcoders: {addresses}")(tmp_path / "org" / "named")

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path / repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    before = sae.load_transcoders(FIXTURES / SETS[0])
    found = sae.load_transcoders("org/sets/small", revision="v1")
    np.testing.assert_array_equal(found.bias(0), before.bias(0))
    assert asked == [("org/sets", "v1", [f"small/{name}"]) for name in ("config.yaml", "*.safetensors")]
    asked.clear()
    found = sae.load_transcoders("org/named")
    np.testing.assert_array_equal(found.bias(0), before.bias(2))
    assert asked[0] == ("org/named", None, ["config.yaml"])
    assert asked[1:] == [("org/sets", "v2", [f"small/layer_{layer}.safetensors"]) for layer in (2, 1, 0)]
    with pytest.raises(sae.InputError, match=r"org/sets: found no config.yaml in org/sets"):
        sae.load_transcoders("org/sets")
    with pytest.raises(sae.InputError, match=r"\.\./sets: found no such file or directory"):
        sae.load_transcoders("../sets")


@pytest.mark.peer
def test_circuit_tracer_opens_what_is_written(tmp_path):
    single = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    torch = pytest.importorskip("torch")
    own = sae.Transcoders.of([trained("batchtopk", layer) for layer in range(2)])
    sae.save_transcoders(own, tmp_path / "set")
    paths = {layer: str(tmp_path / "set" / f"layer_{layer}.safetensors") for layer in range(2)}
    opened = single.load_transcoder_set(paths, "here", own.input_site, own.output_site, device=torch.device("cpu"))
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    theirs = opened.decode(opened.encode(torch.tensor(x)), torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(written(own, x), theirs, atol=1e-5)
