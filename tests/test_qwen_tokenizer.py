"""Text, ids and chats: round trips, transformers' own answers (tests/golden/make_tokens.py), and what is refused."""

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
from qwen_eqx.text.chat import ChatTemplate
from qwen_eqx.text.ids import bucket, check_ids, pad_left, pad_right
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


def render(template: str, messages=({"role": "user", "content": "<é>"},)) -> str:
    return ChatTemplate(template, "here").render(messages, {"add_generation_prompt": False})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.last }}{% endfor %}", "1/1 True"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for i in range(5) %}{{ i }}{% break %}{% endfor %}", "0"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% generation %}{{ 1 }}{% endgeneration %}!", "1!"),
        ("{{ 'a' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ '%s-%d' % ('x', 3) }}", "a1Noneababx-3"),
        ("{{ messages | map(attribute='role') | join(',') | upper }}", "USER"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 2 ** 3 %}{% endfor %}{{ ns.n }}", "8"),
        ("{% if tools %}x{% endif %}{% for q in nothing %}{% endfor %}{{ nothing }}", ""),
        ("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(messages[-1].content.strip('<>')) }}", "<é>"),
        ("  {% if true %}\nkept\n  {% endif %}\nend", "kept\nend"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)  # fmt: skip
def test_templates_render(template: str, expected: str):
    assert render(template) == expected


HOSTILE = [
    "{{ 'x' * 10**9 }}",
    "{{ 'x' * 1000000000 }}",
    "{{ [1] * 1000000000 }}",
    "{{ range(1000000000) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}{% endset %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "{% set ns = namespace(x=2) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "{{ ([('x' * 1000000)] * 4000) | join }}",
    "{{ ''.join([('x' * 1000000)] * 4000) }}",
    "{{ ([('x' * 1000000)] * 4000) | map('upper') | join }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('refused by the template') }}",
    "{% include 'other' %}",
    "{{ lipsum(n=10000000) }}",
    "{{ 1 / 0 }}",
    "{% for x in y",
    "{{ " + "(" * 9000 + ")" * 9000 + " }}",
    "x" * 70000,
]  # fmt: skip


def doubled(what: str, start: str = "[1]", step: str = "[{0}, {0}]") -> str:
    """Two equal values that share nothing, each of 2^24 parts in a few hundred bytes, and what is done to them."""
    sets = "".join(f"{{% set n.{x} = {step.format('n.' + x)} %}}" for x in "ab")
    begin = f"{{% set n = namespace(a={start}, b={start}) %}}"
    return begin + f"{{% for i in range(24) %}}{sets}{{% endfor %}}" + what


COMPARING = [
    "{{ n.a == n.b }}",
    "{{ n.a != n.b }}",
    "{{ n.a < n.b }}",
    "{{ 1 < 2 < 3 and n.a >= n.b }}",
    "{{ n.a in [n.b] }}",
    "{{ n.a not in [n.b] }}",
    "{{ n.a is eq(n.b) }}",
    "{{ n.a is in([n.b]) }}",
    "{{ [n.a] | select('==', n.b) | list | length }}",
    "{{ [{'x': n.a}] | rejectattr('x', 'equalto', n.b) | list | length }}",
    "{{ [n.a, n.b] | sort | length }}",
    "{{ ([n.a, n.b] | max) | length }}",
    "{{ [n.a, n.b] | min | length }}",
    "{{ {'x': n.a, 'y': n.b} | dictsort(by='value') | length }}",
    "{{ [{'x': n.a}, {'x': n.b}] | groupby('x') | length }}",
    "{{ [n.a].index(n.b) }}",
    "{{ [n.a].count(n.b) }}",
    "{% for x in [n.a, n.b] %}{{ loop.changed(x) }}{% endfor %}",
]
HASHING = ["{{ {n.a: 1} | length }}", "{{ {}[n.a] }}", "{{ {}.get(n.a) }}", "{{ n.a in {} }}",
           "{{ dict([(n.a, 1)]) | length }}", "{{ [n.a, n.b] | unique | list | length }}"]  # fmt: skip
SHARING = [doubled(what) for what in COMPARING] + [doubled(what, "(1,)", "({0}, {0})") for what in HASHING]


@pytest.mark.parametrize("template", SHARING, ids=[*COMPARING, *HASHING])
def test_values_that_are_large_only_inside_are_not_compared(template: str):
    with pytest.raises(InputError, match=r"found more than \d+ characters of work"):  # unmetered it would take minutes
        render(template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 1 < 2 < 3 }}{{ 1 < 2 > 5 }}{{ 3 >= 3 }}{{ 1 <= 0 }}{{ 1 != 1 }}", "TrueFalseTrueFalseFalse"),
        ("{{ 'a' in 'cab' }}{{ 'role' in messages[0] }}{{ 'x' not in messages[0] }}", "TrueTrueTrue"),
        ("{{ messages[0].content is in(['<é>']) }}{{ nothing == none }}{{ 'a' in nothing }}", "TrueFalseFalse"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages == messages }}{{ [1, [2]] == [1, [2]] }}{{ [1] < [2] }}{{ [1] in [[1]] }}", "TrueTrueTrueTrue"),
        ("{{ {'b': 1, 'a': 2} | dictsort }}{{ [3, 1] | sort }}{{ {(1, 2): 3}[(1, 2)] }}", "[('a', 2), ('b', 1)][1, 3]3"),
        ("{{ messages[0].get('role') }}{{ [1, 2].index(2) }}{{ 'aa'.count('a') }}", "user12"),
    ],
)  # fmt: skip
def test_comparisons_are_pythons(template: str, expected: str):
    assert render(template) == expected


def test_a_long_conversation_may_be_compared_at_every_turn():
    """What models' own templates do: look into each message's text, and at its role."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' and '</think>' in m.content and m.content != messages[-1].content %}"
        "x{% endif %}{% if 'tool_calls' in m or m == messages[-1] %}y{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": f"{n}</think>" + "long " * 2000} for n in range(200)]
    assert render(template, chat) == "x" * 199 + "y"


@pytest.mark.parametrize("template", HOSTILE, ids=lambda text: text[:40])
def test_hostile_templates_end_in_one_line(template: str):
    with pytest.raises(InputError, match=r"^here: chat_template: found ") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_a_meter_counts_one_rendering_not_their_sum():
    template = ChatTemplate("{{ 'x' * 1000000 }}", "here")
    for _ in range(200):
        assert len(template.render([{"role": "user"}], {})) == 1_000_000


@pytest.mark.parametrize(
    "messages", ["hi", {"role": "user"}, [], ["hi"], [{"content": "x"}], [{"role": object()}], None, 3]
)
def test_no_conversation(messages):
    with pytest.raises(InputError, match=r"^messages"):
        load("tiny-random").apply_chat_template(messages)


@given(length=st.integers(0, 100_000))
def test_buckets_hold_and_waste_at_most_a_third(length: int):
    size = bucket(length)
    assert size >= length
    assert bucket(size) == size
    assert size == 16 or length > size * 2 / 3 - 1


def test_the_ladder():
    assert [bucket(n) for n in (1, 17, 200, 257, 385, 513, 769, 1025, 1537)] == [
        16, 24, 256, 384, 512, 768, 1024, 1536, 2048
    ]  # fmt: skip


@given(rows=st.lists(st.lists(st.integers(0, 511), max_size=9), min_size=1, max_size=5), pad=st.integers(0, 511))
def test_left_padding_keeps_every_row_at_the_right(rows: list[list[int]], pad: int):
    padded = pad_left(rows, 9, pad)
    assert padded.shape == (len(rows), 9)
    assert padded.dtype == np.int32
    for row, found in zip(rows, padded.tolist(), strict=True):
        assert found == [pad] * (9 - len(row)) + row


@given(rows=st.lists(st.lists(st.integers(0, 511), max_size=9), min_size=1, max_size=5), pad=st.integers(0, 511))
def test_right_padding_is_left_padding_seen_in_a_mirror(rows: list[list[int]], pad: int):
    mirrored = pad_left([row[::-1] for row in rows], 9, pad)[:, ::-1]
    np.testing.assert_array_equal(pad_right(rows, 9, pad), mirrored)


@pytest.mark.parametrize("padded", [pad_left, pad_right])
def test_a_row_longer_than_the_padding(padded):
    with pytest.raises(InputError, match=r"rows\[1\]: found 3 tokens, expected at most length=2"):
        padded([[1], [1, 2, 3]], 2, 0)
