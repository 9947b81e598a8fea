"""Bad tokenizer files, names, dtypes and destinations: each ends in one clear line, and nothing is written."""

import json
import re
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
        ("tiny-ark", "found 'tiny-ark', expected an embedded name (tiny-arc), a directory, or a hub id ORG/NAME"),
        ("", "expected an embedded name"),
        ("/nowhere/at/all", "found '/nowhere/at/all', expected an embedded name"),
        ("./model", "expected an embedded name"),
        ("a/b/c", "expected an embedded name"),
        ("../escape", "expected an embedded name"),
        ("tiny-arc/../tiny-arc", "expected an embedded name"),
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


@pytest.mark.parametrize("where", ["tiny-arc", TINY])
def test_only_hub_ids_have_revisions(where):
    with pytest.raises(InputError, match="revision: found 'main'"):
        qwen_eqx.from_pretrained(where, revision="main")


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf17", None, jnp.complex64, object()])
def test_dtypes(dtype):
    with pytest.raises(InputError, match=r"dtype: found .*, expected one of bfloat16, float16, float32"):
        qwen_eqx.from_pretrained("tiny-arc", dtype=dtype)


def test_saving_onto_a_file(tmp_path: Path):
    model, tokenizer = qwen_eqx.from_pretrained("tiny-arc")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match="directory: found a file at"):
        qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "taken")
    with pytest.raises(InputError, match="max_shard_bytes: found 0, expected at least 1"):
        qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "new", max_shard_bytes=0)
    assert (tmp_path / "taken").read_text() == "mine"
    assert not (tmp_path / "new").exists()
