"""Text to token ids and back as a model directory's own tokenizer files say."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from qwen_eqx.errors import InputError
from qwen_eqx.files import local_path, read_bytes, read_json, read_text
from qwen_eqx.text.chat import MAX_TEMPLATE_CHARS, ChatTemplate
from qwen_eqx.text.ids import check_ids

VOCABULARY, SETTINGS, TEMPLATE, GENERATION = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
BYTES = tokenizers.pre_tokenizers.ByteLevel.alphabet()  # the 256 characters that stand for bytes


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer: byte-level BPE through `tokenizers`, its special tokens, its chat template.

    `vocab_size` is the model's: ids that the model has and the tokenizer does not (Qwen pads its embedding) decode to
    nothing, as in transformers; ids beyond it are refused.
    """

    backend: tokenizers.Tokenizer
    vocab_size: int
    special_tokens: Mapping[str, str]  # name -> token, e.g. eos_token -> <|im_end|>
    eos_ids: tuple[int, ...]  # every id that ends a text: generation_config.json's, then eos_token
    chat_template: str | None
    files: Mapping[str, bytes]  # the files it was read from, kept word for word
    where: str

    def __repr__(self) -> str:
        chat = "with" if self.chat_template is not None else "without"
        tokens = self.backend.get_vocab_size(with_added_tokens=True)
        return (
            f"Tokenizer({tokens:,} tokens of a vocabulary of {self.vocab_size:,}, {chat} chat template, {self.where!r})"
        )

    @classmethod
    def from_directory(cls, directory: str | Path, *, vocab_size: int | None = None) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a directory."""
        directory = local_path(directory, "directory")
        files = {VOCABULARY: read_bytes(directory / VOCABULARY)}
        files |= {
            name: read_bytes(directory / name)
            for name in (SETTINGS, TEMPLATE, GENERATION)
            if (directory / name).exists()
        }
        backend = _backend(files[VOCABULARY], directory / VOCABULARY)
        settings = read_json(directory / SETTINGS) if SETTINGS in files else {}
        largest = _largest_id(backend)
        if vocab_size is None:
            vocab_size = largest + 1
        if largest >= vocab_size:
            token = backend.id_to_token(largest)
            raise InputError(
                f"{directory / VOCABULARY}: token {token!r}: found id {largest}, "
                f"expected ids below the model's vocab_size={vocab_size}"
            )
        _check_added(settings, backend, directory / SETTINGS)
        special = _special_tokens(settings, backend, directory / SETTINGS)
        return cls(
            backend=backend,
            vocab_size=vocab_size,
            special_tokens=special,
            eos_ids=_eos_ids(directory / GENERATION, GENERATION in files, special, backend, vocab_size),
            chat_template=_chat_template(settings, directory, TEMPLATE in files),
            files=files,
            where=str(directory),
        )

    def __call__(self, *arguments: Any, **named: Any) -> None:
        """Not the way to call it: transformers' tokenizers return a dict of padded arrays, which nothing here takes."""
        raise InputError(
            "tokenizer: found a call of it, expected tokenizer.encode(text) for ids, "
            "or tokenizer.apply_chat_template(messages) for those of a conversation"
        )

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; special tokens written in it become themselves, and nothing is added around it."""
        return self._encoding(text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and for each the characters `text[start:end]` that it stands for.

        Tokens that share the bytes of one character all name it; together the spans cover the text.
        """
        encoding = self._encoding(text)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: Any) -> tokenizers.Encoding:
        if not isinstance(text, str):
            if isinstance(text, list | tuple) and text and all(isinstance(part, str) for part in text):
                remedy = "one text; call [tokenizer.encode(text) for text in texts]"
            elif isinstance(text, list | tuple) and text and all(isinstance(part, Mapping) for part in text):
                remedy = "text; tokenizer.apply_chat_template(messages) encodes a conversation"
            else:
                remedy = "text; tokenizer.decode(ids) makes text of ids"
            raise InputError(f"text: found a {type(text).__name__}, expected {remedy}")
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception and TypeError
            raise InputError(f"text: found {_surrogate(text) or error}, expected text that UTF-8 can write") from None
        if not self._keeps_every_byte:
            self._check_nothing_lost(text, encoding)
        return encoding

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        """The text of a list or array of token ids; bytes that are no UTF-8 become U+FFFD, and no space is cleaned up."""
        checked = check_ids(ids, self.vocab_size)
        try:
            return self.backend.decode(checked, skip_special_tokens=skip_special_tokens)
        except Exception as error:
            raise InputError(f"ids: found {error}, expected ids that {self.where} decodes") from None

    def render_chat(self, messages: Any, add_generation_prompt: bool = False, **arguments: Any) -> str:
        """The text of a conversation, a list of {role, content}, by the model's own chat template."""
        if self._template is None:
            raise InputError(
                f"{self.where}: chat_template: found none in {SETTINGS} and no {TEMPLATE}, "
                "expected one; a base model takes encode(text)"
            )
        named = {**self.special_tokens, "tools": None, "documents": None, **arguments}
        return self._template.render(messages, named | {"add_generation_prompt": add_generation_prompt})

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = False, **arguments: Any) -> list[int]:
        """The token ids of a conversation; with `add_generation_prompt` it ends where the assistant begins."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **arguments))

    def token_to_id(self, token: str) -> int:
        """The id of one token of the vocabulary, e.g. `<|im_end|>`."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"token {token!r}: found no such token in {self.where}, expected one of its vocabulary")
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it; None for an id only the model has."""
        return self.backend.id_to_token(check_ids([token_id], self.vocab_size)[0])

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if any."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def pad_id(self) -> int:
        """The token to pad with: pad_token, else eos_token, else 0 (padding is masked, so the choice is cosmetic)."""
        token = self.special_tokens.get("pad_token")
        return self.token_to_id(token) if token is not None else (self.eos_id or 0)

    @property
    def largest_id(self) -> int:
        """The largest id of any token; the model's own vocabulary may be larger."""
        return _largest_id(self.backend)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's files: equal digests read and write the same ids."""
        total = hashlib.sha256()
        for name in (VOCABULARY, SETTINGS, TEMPLATE):
            if name in self.files:
                total.update(f"{name} {len(self.files[name])}\n".encode() + self.files[name])
        return total.hexdigest()

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return None if self.chat_template is None else ChatTemplate(self.chat_template, self.where)

    @cached_property
    def _keeps_every_byte(self) -> bool:
        return all(self.backend.token_to_id(byte) is not None for byte in BYTES)

    def _check_nothing_lost(self, text: str, encoding: tokenizers.Encoding) -> None:
        """`tokenizers` drops a character that no token covers without a word."""
        covered = bytearray(len(text))
        for start, end in encoding.offsets:
            covered[start:end] = b"\1" * (end - start)
        lost = next((at for at, char in enumerate(text) if not covered[at] and not char.isspace()), None)
        if lost is not None:
            raise InputError(
                f"text: found {text[lost]!r} at {lost}, expected characters that {self.where}/{VOCABULARY} covers"
            )


def _backend(data: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises bare Exception and ValueError
        raise InputError(f"{path}: found {_one_line(error)}, expected a tokenizer that `tokenizers` reads") from None
    backend.no_truncation()  # settings a training run left in the file would cut prompts short
    backend.no_padding()
    return backend


def _largest_id(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(settings: dict[str, Any], backend: tokenizers.Tokenizer, path: Path) -> dict[str, str]:
    special = {}
    for name in NAMED_TOKENS:
        token = _content(settings.get(name))
        if token is None:
            continue
        if not isinstance(token, str):
            raise InputError(f"{path}: {name}: found {token!r}, expected text")
        if backend.token_to_id(token) is None:
            raise InputError(f"{path}: {name}: found {token!r}, expected a token of {VOCABULARY}")
        special[name] = token
    return special


def _check_added(settings: dict[str, Any], backend: tokenizers.Tokenizer, path: Path) -> None:
    added = settings.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise InputError(f"{path}: added_tokens_decoder: found a {type(added).__name__}, expected an object")
    for key, token in added.items():
        content = _content(token)
        if not isinstance(content, str) or str(backend.token_to_id(content)) != key:
            has = backend.token_to_id(content) if isinstance(content, str) else None
            raise InputError(
                f"{path}: added_tokens_decoder: found {content!r} at id {key}, expected {VOCABULARY}'s id {has}"
            )


def _eos_ids(
    path: Path, exists: bool, special: Mapping[str, str], backend: tokenizers.Tokenizer, vocab_size: int
) -> tuple[int, ...]:
    ends = read_json(path).get("eos_token_id") if exists else None
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise InputError(f"{path}: eos_token_id: found {value!r}, expected token ids in 0..{vocab_size - 1}")
    if "eos_token" in special:
        listed = [*listed, backend.token_to_id(special["eos_token"])]
    return tuple(dict.fromkeys(listed))


def _chat_template(settings: dict[str, Any], directory: Path, in_file: bool) -> str | None:
    if in_file:  # the newer place, and the one transformers prefers
        return read_text(directory / TEMPLATE, limit=4 * MAX_TEMPLATE_CHARS)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several of them by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        kind = type(template).__name__
        raise InputError(f"{directory / SETTINGS}: chat_template: found a {kind}, expected text")
    return template


def _surrogate(text: str) -> str:
    lone = next((at for at, char in enumerate(str(text)) if "\ud800" <= char <= "\udfff"), None)
    return "" if lone is None else f"the lone surrogate {text[lone]!r} at {lone}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
