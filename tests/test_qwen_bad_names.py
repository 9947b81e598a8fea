"""Bad tokenizer files, names, dtypes and destinations: each ends in one clear line, and nothing is written."""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

import qwen_eqx
from damage import POINTER, TINY, Damage, fields, refuse, remove, write
from qwen_eqx import InputError


@pytest.fixture
def single(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def vocabulary(change: Callable[[dict], object]) -> Damage:
    def damage(directory: Path) -> None:
        found = json.loads((directory / "tokenizer.json").read_text())
        change(found)
        (directory / "tokenizer.json").write_text(json.dumps(found))

    return damage


def added(content: str, number: int) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content} | flags


SETTINGS = "tokenizer_config.json"
TOKENIZER_CASES = {
    "missing": (remove("tokenizer.json"), r"tokenizer\.json: found no such file"),
    "empty": (write("tokenizer.json", ""), r"tokenizer\.json: found .*expected a tokenizer"),
    "no-json": (write("tokenizer.json", "{,}"), r"tokenizer\.json: found .*expected a tokenizer"),
    "no-model": (vocabulary(lambda found: found.pop("model")), r"tokenizer\.json: found .*expected a tokenizer"),
    "lfs-pointer": (write("tokenizer.json", POINTER), r"tokenizer\.json: found a Git LFS pointer"),
    "bad-merge": (
        vocabulary(lambda found: found["model"].update(merges=["nosuch token"])),
        r"tokenizer\.json: found .*expected a tokenizer",
    ),
    "added-id-beyond-the-vocabulary": (
        vocabulary(lambda found: found["model"]["vocab"].update({"zzz": 600})),
        r"tokenizer\.json: token 'zzz': found id 600, expected ids below the model's vocab_size=512",
    ),
    "more-tokens-than-the-model": (
        vocabulary(lambda found: found["added_tokens"].append(added("<|new|>", 512))),
        r"token '<\|new\|>': found id 512, expected ids below the model's vocab_size=512",
    ),
    "settings-no-json": (write(SETTINGS, "eos"), rf"{SETTINGS}: found .*expected JSON"),
    "settings-no-object": (write(SETTINGS, "3"), rf"{SETTINGS}: found a JSON int, expected an object"),
    "unknown-eos": (fields(SETTINGS, eos_token="<|end|>"), rf"{SETTINGS}: eos_token: found '<\|end\|>', expected a token"),
    "number-for-pad": (fields(SETTINGS, pad_token=3), f"{SETTINGS}: pad_token: found 3, expected text"),
    "other-added-tokens": (
        fields(SETTINGS, added_tokens_decoder={"7": added("<|im_end|>", 7)}),
        f"{SETTINGS}: added_tokens_decoder: found '<.im_end.>' at id 7, expected tokenizer.json's id 511",
    ),
    "added-tokens-list": (fields(SETTINGS, added_tokens_decoder=[1]), "added_tokens_decoder: found a list"),
    "template-no-text": (
        lambda directory: (remove("chat_template.jinja")(directory), fields(SETTINGS, chat_template=3)(directory)),
        f"{SETTINGS}: chat_template: found a int, expected text",
    ),
    "template-no-utf8": (write("chat_template.jinja", b"\xff\xfe"), r"chat_template\.jinja: found byte 0xff at 0"),
    "template-of-megabytes": (write("chat_template.jinja", "x" * 10**6), r"chat_template\.jinja: found 1000000 bytes"),
    "stop-beyond-the-vocabulary": (
        fields("generation_config.json", eos_token_id=[511, 512]),
        r"generation_config\.json: eos_token_id: found 512, expected token ids in 0\.\.511",
    ),
    "stop-no-id": (fields("generation_config.json", eos_token_id="511"), "eos_token_id: found '511'"),
    "generation-no-json": (write("generation_config.json", "["), r"generation_config\.json: found .*expected JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), TOKENIZER_CASES.values(), ids=TOKENIZER_CASES)
def test_tokenizer(single: Path, damage: Damage, message: str):
    refuse(single, damage, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tiny-ark",
            "found 'tiny-ark', expected an embedded name (tiny-arc, tiny-random), a directory, or a hub id ORG/NAME",
        ),
        ("", "expected an embedded name"),
        ("/nowhere/at/all", "found '/nowhere/at/all', expected an embedded name"),
        ("./model", "expected an embedded name"),
        ("a/b/c", "expected an embedded name"),
        ("../escape", "expected an embedded name"),
        ("tiny-random/../tiny-random", "expected an embedded name"),
        ("https://hub/org/name", "expected an embedded name"),
        (Path("org/name"), "expected an embedded name"),
        ("org/na\nme", "expected an embedded name"),
    ],
)
def test_no_such_model(name, message: str):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        qwen_eqx.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_directory():
    with pytest.raises(InputError, match="which is a file, expected the directory it lies in"):
        qwen_eqx.from_pretrained(TINY / "config.json")


@pytest.mark.parametrize("where", ["tiny-random", TINY])
def test_only_hub_ids_have_revisions(where):
    with pytest.raises(InputError, match="revision: found 'main'"):
        qwen_eqx.from_pretrained(where, revision="main")


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf17", None, jnp.complex64, object()])
def test_dtypes(dtype):
    with pytest.raises(InputError, match=r"dtype: found .*, expected one of bfloat16, float16, float32"):
        qwen_eqx.from_pretrained("tiny-random", dtype=dtype)


def test_saving_onto_a_file(tmp_path: Path):
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match="directory: found a file at"):
        qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "taken")
    with pytest.raises(InputError, match="max_shard_bytes: found 0, expected at least 1"):
        qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "new", max_shard_bytes=0)
    assert (tmp_path / "taken").read_text() == "mine"
    assert not (tmp_path / "new").exists()


NO_PATHS = {
    "longer than the system takes": "x" * 5000,
    "a name longer than the system takes": "/tmp/" + "y" * 300,
    "nobody's": "~nobody-of-that-name/model",
    "with a NUL": "a\0b",
    "a lone surrogate": "a\ud800b",
}


PATH_CALLS = {
    "load": qwen_eqx.from_pretrained,
    "load a path": lambda given: qwen_eqx.from_pretrained(Path(given)),
    "tokenizer": qwen_eqx.Tokenizer.from_directory,
    "save": lambda given: qwen_eqx.save_pretrained(*qwen_eqx.from_pretrained("tiny-random"), given),
}


@pytest.mark.parametrize("name", NO_PATHS)
@pytest.mark.parametrize("call", PATH_CALLS)
def test_what_the_system_takes_for_no_path(call: str, name: str):
    with pytest.raises(InputError, match=r"^(model|directory): found ") as caught:
        PATH_CALLS[call](NO_PATHS[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_saving_below_a_file_or_onto_directories(tmp_path: Path):
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"directory: found .*Not a directory"):
        qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "file" / "below")
    (tmp_path / "model" / "config.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"config\.json: found a directory"):
        qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_directory_in_a_files_place(single: Path, name: str):
    (single / name).unlink()
    (single / name).mkdir()
    refuse(single, lambda _: None, re.escape(name))


def test_a_disk_that_fills_up(tmp_path: Path):
    """The largest file that the process may write stands for a disk: the kernel refuses in the middle of a write."""
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    for room in (100, 60_000, 200_000):  # in a small file, and at two places in the weights
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(qwen_eqx.DiskFull, match=r"model\.safetensors: found [\d,]+ bytes free") as caught:
                qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "model")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert isinstance(caught.value, OSError)
        assert caught.value.needed > room
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "model").iterdir()) == []


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(qwen_eqx.DiskFull, match=r"found 1,000 bytes free"):
        qwen_eqx.save_pretrained(*qwen_eqx.from_pretrained("tiny-random"), tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []
