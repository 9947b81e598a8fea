"""Texts of any kind as passages: .txt, JSONL, parquet or a Hugging Face data set, streamed; whole, split or packed."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import arc
import qwen_eqx
from arc.records import HUB, STREAMED, iter_records
from qwen_lab.errors import InputError
from qwen_lab.passages import Cursor, Passage, Segment, by_record

Fit = Literal["skip", "split", "pack"]
TXT, TXT_CHARACTERS = ".txt", 1 << 16
TEXTS = (TXT, *STREAMED)
PUZZLE_FIELDS = ("train", "test", "examples")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and where it stands."""

    source: str
    text: str


def files_of(source: str) -> list[str]:
    """The files of texts that a name stands for: itself, or those of a directory in order of name."""
    if Path(source).is_dir():
        return [str(path) for path in sorted(Path(source).iterdir()) if path.name.endswith(TEXTS)]
    return [source] if source.endswith(TEXTS) else []


def is_texts(source: str) -> bool:
    """Whether a source holds texts, not puzzles: its suffix says so, or the first record of its first file."""
    files = files_of(source)
    if not files:
        return not Path(source).exists() and hub_id(source) is not None
    if files[0].endswith(TXT):
        return True
    first = next((record for _, record in iter_records(files[0])), {})
    return isinstance(first, dict) and not any(name in first for name in PUZZLE_FIELDS)


def hub_id(source: str) -> tuple[str, str] | None:
    """`owner/name` or `owner/name:split` of a Hugging Face data set; None for what is no such name."""
    name, _, split = source.partition(":")
    known = name in arc.data.BUNDLED or arc.generators.sides_of(name) is not None
    plain = name.count("/") == 1 and all(part and part[0] not in ".~" for part in name.split("/"))
    return (name, split or "train") if plain and not known and not name.endswith(".json") else None


def documents(sources: Iterable[str], tokenizer: qwen_eqx.Tokenizer, start: int = 0) -> Iterator[tuple[int, Document]]:
    """Every document of the sources with its number, from number `start` on."""
    every = (document for source in sources for document in _of_source(source, tokenizer))
    yield from itertools.islice(enumerate(every), start, None)


def _of_source(source: str, tokenizer: qwen_eqx.Tokenizer) -> Iterator[Document]:
    files = files_of(source)
    if not files and not Path(source).exists() and not source.startswith(HUB) and (named := hub_id(source)):
        records = ((f"{source}: row {number}", record) for number, record in enumerate(_hub(*named), 1))
        yield from (Document(where, text_of(record, where, tokenizer)) for where, record in records)
        return
    if not files:
        raise InputError(f"--data {source}: found no {', '.join(TEXTS)} file, expected one, or a directory of them")
    for file in files:
        if file.endswith(TXT):
            yield from _text_file(file)
            continue
        for where, record in iter_records(file):
            if isinstance(record, InputError | arc.InputError):
                raise record
            yield Document(where, text_of(record, where, tokenizer))


def _text_file(path: str) -> Iterator[Document]:
    """A text file is one document; of a long one so many characters at a time, to the end of a line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            for number in itertools.count():
                text = handle.read(TXT_CHARACTERS)
                if len(text) == TXT_CHARACTERS:
                    text += handle.readline(TXT_CHARACTERS)
                if not text:
                    return
                yield Document(path if number == 0 else f"{path}: part {number + 1}", text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are no UTF-8 text ({error.reason}), expected UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _hub(name: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets  # an extra: files need none  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"--data {name}: found no such file, and a data set of the hub needs `datasets`: pip install datasets"
        ) from None
    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the hub's errors share no base class
        raise InputError(f"--data {name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from None


def text_of(record: dict[str, Any], where: str, tokenizer: qwen_eqx.Tokenizer) -> str:
    """The `text` of a record, or its `messages` as the model's chat template writes them."""
    if isinstance(text := record.get("text"), str):
        return text
    messages = record.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError:
            messages = None
    if isinstance(messages, list):
        return tokenizer.render_chat(messages)
    found = ", ".join(map(str, record)) or "no fields"
    raise InputError(
        f"{where}: found {found:.80}, expected a field `text` that is a text, or `messages` that is a list"
    )


@dataclasses.dataclass(frozen=True)
class Texts:
    """Documents as passages of at most `length` tokens.

    skip: a document is a passage, and one that is longer is skipped. split: it is cut into passages. pack: all documents are
    one stream that is cut, so that every passage but the last is full.
    """

    sources: tuple[str, ...]
    tokenizer: qwen_eqx.Tokenizer
    length: int
    fit: Fit = "split"
    bos: int | None = None  # a token that every passage begins with, and every document of a packed one
    limit: int | None = None  # documents

    def __post_init__(self) -> None:
        if self.length <= len(self._bos):
            raise InputError(f"--context-length: found {self.length}, expected more than the token of --bos")

    @property
    def _bos(self) -> list[int]:
        return [] if self.bos is None else [self.bos]

    def read(self, segments: Iterable[Segment]) -> Iterator[tuple[Cursor, Passage]]:
        """Passages from the segments' cursors; of a split document a cursor counts passages, of a packed one tokens."""
        if self.fit == "pack":
            return self._packed(segments)
        return by_record(self._records, self._cut, segments)

    def _records(self, start: int) -> Iterator[tuple[int, Document]]:
        yield from itertools.takewhile(
            lambda each: self.limit is None or each[0] < self.limit, documents(self.sources, self.tokenizer, start)
        )

    def _encode(self, document: Document) -> list[int]:
        try:
            return self.tokenizer.encode(document.text)
        except qwen_eqx.InputError as error:
            raise InputError(f"{document.source}: {error}") from None

    def _cut(self, number: int, document: Document) -> list[Passage]:
        ids = self._encode(document)
        said = {"source": document.source, "record": number}
        room = self.length - len(self._bos)
        if not ids:
            return []
        if self.fit == "skip" and len(ids) > room:
            detail = f"found {len(ids) + len(self._bos)} tokens, expected at most {self.length}"
            return [Passage([], said | {"text": "", "outcome": "too long", "detail": detail})]
        starts = range(0, len(ids), room)
        return [_passage(self._bos + ids[at : at + room], said | {"from_token": at}, self.tokenizer) for at in starts]

    def _packed(self, segments: Iterable[Segment]) -> Iterator[tuple[Cursor, Passage]]:
        stream: _Stream | None = None
        for start, items in segments:
            stream = stream or _Stream(self._records(start.record), lambda each: self._bos + self._encode(each))
            stream.seek(start)
            for _ in itertools.count() if items is None else range(items):
                ids, begin, said = [], start, {}
                while stream.document is not None and len(ids) < self.length:
                    if not ids:
                        begin, said = Cursor(stream.number, stream.at), {"source": stream.document.source}
                        ids = list(self._bos) if stream.at else []
                    ids += stream.take(self.length - len(ids))
                if not ids:
                    break
                said |= {"record": begin.record, "from_token": begin.within}
                yield begin, _passage(ids, said, self.tokenizer)


def _passage(ids: list[int], said: dict[str, Any], tokenizer: qwen_eqx.Tokenizer) -> Passage:
    return Passage(ids, said | {"text": tokenizer.decode(ids), "outcome": "text"})


class _Stream:
    """The tokens of documents one after the other; a document is encoded when the first of its tokens is taken."""

    def __init__(self, records: Iterator[tuple[int, Document]], encode: Callable[[Document], list[int]]):
        self.records, self.encode = records, encode
        self._next()

    def _next(self) -> None:
        self.number, self.document = next(self.records, (0, None))
        self.at, self.ids = 0, None

    def seek(self, to: Cursor) -> None:
        """Goes forward to a document, and to a token of it."""
        while self.document is not None and self.number < to.record:
            self._next()
        self.at = to.within

    def take(self, most: int) -> list[int]:
        """The next tokens, none beyond the document's end."""
        assert self.document is not None
        if self.ids is None:
            self.ids = self.encode(self.document)
        taken = self.ids[self.at : self.at + most]
        self.at += len(taken)
        if self.at >= len(self.ids):
            self._next()
        return taken
