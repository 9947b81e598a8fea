"""Text, ids and chats: round trips, transformers' own answers (tests/golden/make_tokens.py), and wrong calls."""

import inspect
import json
import shutil
import unicodedata
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from qwen_eqx import InputError, Tokenizer
from qwen_eqx.text.ids import check_ids
from qwen_eqx.weights.hub import EMBEDDED

ROOT = Path(__file__).parent.parent
DIRECTORIES = {
    "tiny-random": EMBEDDED / "tiny-random",
    "qwen2.5": ROOT.parent / "shared" / "data" / "qwen2.5-tokenizer",
}
VOCAB = {"tiny-random": 512, "qwen2.5": 151936}
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
GOLDEN = json.loads((ROOT / "tests" / "golden" / "tokens.json").read_text())


@cache
def load(name: str) -> Tokenizer:
    if not DIRECTORIES[name].exists():
        pytest.skip(f"{name}'s tokenizer files are not here")
    return Tokenizer.from_directory(DIRECTORIES[name], vocab_size=VOCAB[name])


@pytest.fixture(params=["tiny-random", "qwen2.5"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_texts_become_the_ids_that_transformers_gives(name: str):
    tokenizer = load(name)
    for item in GOLDEN[name]["texts"]:
        ids = tokenizer.encode(item["text"])
        assert ids == item["ids"], item["text"]
        assert tokenizer.decode(ids) == item["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == item["bare"]


def test_chats_render_as_transformers_renders_them(name: str):
    tokenizer = load(name)
    for item in GOLDEN[name]["chats"]:
        assert tokenizer.render_chat(item["messages"], add_generation_prompt=item["prompt"]) == item["text"]
        assert tokenizer.apply_chat_template(item["messages"], add_generation_prompt=item["prompt"]) == item["ids"]


@given(text=TEXT)
def test_decode_gives_back_the_normalized_text(text: str):
    tokenizer = load("tiny-random")
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@given(data=st.binary(max_size=40))
def test_every_byte_has_a_token(data: bytes):
    tokenizer = load("tiny-random")
    alphabet = _byte_alphabet()
    ids = [tokenizer.token_to_id(alphabet[byte]) for byte in data]
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")


@given(text=TEXT)
def test_offsets_cover_the_text_in_order(text: str):
    ids, spans = load("tiny-random").encode_with_offsets(text)
    assert ids == load("tiny-random").encode(text)
    assert len(spans) == len(ids)
    assert spans == sorted(spans)
    assert {at for start, end in spans for at in range(start, end)} == set(range(len(text)))


@given(text=st.text(st.characters(max_codepoint=127)))
def test_offsets_are_what_the_tokens_say(text: str):
    for token, (start, end) in zip(*load("tiny-random").encode_with_offsets(text), strict=True):
        assert load("tiny-random").decode([token]) == text[start:end]


def test_offsets_count_characters_and_not_bytes():
    ids, spans = load("tiny-random").encode_with_offsets("é🙂0")
    assert spans[-1] == (2, 3)
    assert load("tiny-random").decode([ids[-1]]) == "0"


ENCODE = inspect.unwrap(Tokenizer.encode)  # as a user meets it, without the suite's type checks
CALLS = {
    "called": (lambda t: t("hello"), ["tokenizer.encode(text)", "apply_chat_template"]),
    "called as transformers' is": (lambda t: t(["a", "b"], return_tensors="np"), ["tokenizer.encode(text)"]),
    "several texts": (lambda t: ENCODE(t, ["a", "b"]), ["list", "for text in texts"]),
    "a conversation": (lambda t: ENCODE(t, [{"role": "user", "content": "x"}]), ["apply_chat_template"]),
    "ids": (lambda t: ENCODE(t, [1, 2]), ["list", "tokenizer.decode"]),
    "bytes": (lambda t: ENCODE(t, b"a"), ["bytes", "text"]),
    "none": (lambda t: ENCODE(t, None), ["NoneType", "text"]),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_says_the_right_one(case: str):
    call, parts = CALLS[case]
    with pytest.raises(InputError) as caught:
        call(load("tiny-random"))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others count up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@given(digits=st.text("0123456789", min_size=1, max_size=30))
def test_every_digit_is_one_token(digits: str):
    tokenizer = load("tiny-random")
    assert [tokenizer.id_to_token(token) for token in tokenizer.encode(digits)] == list(digits)


def test_what_the_files_say(name: str):
    tokenizer = load(name)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.pad_id == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.eos_id == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.vocab_size == VOCAB[name]
    assert tokenizer.largest_id < tokenizer.vocab_size
    assert len(tokenizer.digest) == 64


def test_generation_config_adds_stop_tokens():
    assert load("tiny-random").eos_ids == (511, 509)


def test_ids_may_come_as_arrays():
    tokenizer = load("tiny-random")
    ids = tokenizer.encode("as arrays")
    for given_ids in (np.array(ids), jnp.array(ids), list(jnp.array(ids)), tuple(ids), iter(ids)):
        assert tokenizer.decode(given_ids) == "as arrays"


def test_an_id_only_the_model_has_decodes_to_nothing():
    tokenizer = Tokenizer.from_directory(DIRECTORIES["tiny-random"], vocab_size=600)
    assert tokenizer.decode([*tokenizer.encode("a"), 599, *tokenizer.encode("b")]) == "ab"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([512], r"ids\[0\]: found 512, expected a token id in 0..511"),
        ([3, -1], r"ids\[1\]: found -1"),
        ([1.5], "expected a flat list of whole numbers"),
        ([[1, 2]], "expected a flat list of whole numbers"),
        (["a"], "expected a flat list of whole numbers"),
        (7, "expected a flat list of whole numbers"),
        (np.zeros((2, 2), np.int32), "expected a flat list of whole numbers"),
        (np.array(3), "expected a flat list of whole numbers"),
    ],
)
def test_no_ids(ids, message: str):
    with pytest.raises(InputError, match=message):
        load("tiny-random").decode(ids)
    with pytest.raises(InputError, match=message):
        check_ids(ids, 512)


def test_a_lone_surrogate_is_no_text():
    with pytest.raises(InputError, match=r"text: found the lone surrogate '\\ud800' at 5"):
        load("tiny-random").encode("lone \ud800 surrogate")


def test_unknown_token():
    with pytest.raises(InputError, match=r"'<\|nothing\|>': found no such token"):
        load("tiny-random").token_to_id("<|nothing|>")


def toy(directory: Path, backend: tokenizers.Tokenizer, **settings) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_a_character_no_token_covers_is_refused_not_dropped(tmp_path: Path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tokenizer = Tokenizer.from_directory(toy(tmp_path, backend))
    assert tokenizer.encode("abba") == [0, 1, 1, 0]
    with pytest.raises(InputError, match="found 'c' at 2"):
        tokenizer.encode("abc")


def test_truncation_left_in_the_file_cuts_nothing(tmp_path: Path):
    backend = tokenizers.Tokenizer.from_file(str(DIRECTORIES["tiny-random"] / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    text = "one two three four five"
    assert Tokenizer.from_directory(toy(tmp_path, backend)).encode(text) == load("tiny-random").encode(text)


def test_a_base_model_has_no_chat(tmp_path: Path):
    backend = tokenizers.Tokenizer.from_file(str(DIRECTORIES["tiny-random"] / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(toy(tmp_path, backend))
    assert tokenizer.pad_id == 0
    assert tokenizer.eos_id is None
    with pytest.raises(InputError, match="chat_template: found none"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_where_a_template_may_stand(tmp_path: Path):
    for file in ("tokenizer.json", "generation_config.json"):
        shutil.copy(DIRECTORIES["tiny-random"] / file, tmp_path / file)
    settings = tmp_path / "tokenizer_config.json"
    hello = [{"role": "user", "content": "x"}]
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert Tokenizer.from_directory(tmp_path).render_chat(hello) == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_directory(tmp_path).render_chat(hello) == "two"
    (tmp_path / "chat_template.jinja").write_text("three {{ enable_thinking }}{{ eos_token }}")
    settings.write_text(json.dumps({"chat_template": "one", "eos_token": {"content": "<|im_end|>"}}))
    shown = Tokenizer.from_directory(tmp_path).render_chat(hello, enable_thinking=False)
    assert shown == "three False<|im_end|>"


def test_digest_follows_the_files(tmp_path: Path):
    shutil.copytree(DIRECTORIES["tiny-random"], tmp_path / "copy")
    assert Tokenizer.from_directory(tmp_path / "copy").digest == load("tiny-random").digest
    (tmp_path / "copy" / "chat_template.jinja").write_text("other")
    assert Tokenizer.from_directory(tmp_path / "copy").digest != load("tiny-random").digest
