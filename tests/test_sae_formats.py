"""Where SAEs are found: local paths first, then the hub's cache, asking only for the files of one SAE."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest

import sae

FIXTURES = Path(__file__).parent / "fixtures" / "sae"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, made of the fixtures; remembers what was asked of it."""
    asked = []
    shutil.copytree(FIXTURES, tmp_path / "snapshot")
    qwen = FIXTURES / "qwen_scope" / "SAE-Res-Tiny-W16K-L0_3" / "layer2.sae.pt"
    shutil.copy(qwen, tmp_path / "snapshot" / "layer2.sae.pt")

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        if repository != "org/name":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such thing\nin two lines")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_folder_of_a_repository(hub):
    assert type(sae.load("org/name/saelens/gated", revision="v1")) is sae.Gated
    repository, revision, wanted = hub[0]
    assert (repository, revision) == ("org/name", "v1")
    assert "saelens/gated/cfg.json" in wanted
    assert all(name.startswith("saelens/gated/") and "*" not in name for name in wanted)
    assert type(sae.load("org/name/gemma_scope/layer_1/width_16/average_l0_4")) is sae.JumpReLU


def test_a_file_of_a_repository(hub):
    assert sae.load("org/name/layer2.sae.pt", k=2).k == 2
    assert hub[0][2] == ["layer2.sae.pt"]
    assert type(sae.load("org/name/dictionary_learning/BatchTopKSAE/ae.pt")) is sae.BatchTopK
    assert hub[1][2] == [f"dictionary_learning/BatchTopKSAE/{name}" for name in ("ae.pt", "config.json")]


def test_a_local_directory_comes_first(hub, tmp_path):
    shutil.copytree(FIXTURES / "saelens" / "topk", tmp_path / "org" / "name")
    assert type(sae.load("org/name")) is sae.TopK
    assert hub == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/other", "hf download org/other --include 'cfg.json'"),
        ("org/other/layer1.sae.pt", "--include 'layer1.sae.pt'"),
        ("org/name/absent", "found no absent in org/name"),
        ("org/name", "k: found none"),
        ("name", "no such file or directory"),
        ("/absent/directory", "no such file or directory"),
        ("org/../name", "no such file or directory"),
        ("org/name/../../etc", "no such file or directory"),
        ("https://elsewhere/x", "no such file or directory"),
        ("", "no other known SAE"),
    ],
)
def test_what_is_nowhere_is_refused_with_the_way_out(hub, source, expected):
    with pytest.raises(sae.InputError) as error:
        sae.load(source)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_network_nothing_is_guessed():
    with pytest.raises(sae.InputError, match="could not fetch nobody/nothing"):
        sae.load("nobody/nothing")
