"""What an item of a store is made of, as a stream: passages of token ids, each where it began, read again from anywhere."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

import sae
from qwen_lab import prompts
from qwen_lab.errors import InputError
from qwen_lab.marks import Marks

Record = TypeVar("Record")


class Cursor(NamedTuple):
    """Where a passage begins: a record of the data, and a passage or a token inside it."""

    record: int
    within: int = 0


class Segment(NamedTuple):
    """So many passages from a cursor on; None: to the end."""

    start: Cursor
    items: int | None = None


@dataclasses.dataclass(frozen=True)
class Passage:
    """The tokens that an item reads, and what its sidecar says of it; without tokens it is skipped."""

    tokens: list[int]
    said: Mapping[str, Any]
    prompt: int | None = None  # tokens before an answer that is read with them; None: no answer among them
    marks: Callable[[], Marks] | None = None  # the cells that the tokens stand in
    asked: prompts.Item | None = None  # what a model is to answer

    @property
    def name(self) -> str:
        return named(self.said)

    @functools.cached_property
    def digest(self) -> str:
        """Sixteen digits of what it is: a store that goes on over other data is told from one that goes on."""
        data = np.asarray(self.tokens, "<i4").tobytes() + json.dumps([self.prompt, self.name]).encode()
        return hashlib.sha256(data).hexdigest()[:16]


def named(said: Mapping[str, Any]) -> str:
    """Which item it is, of what a sidecar says: `task 007bbfb7, test 0`, or `record 12, from_token 0`."""
    return ", ".join(
        f"{key} {said[key]}" for key in ("task", "test", "augmentation", "record", "from_token") if key in said
    )


@runtime_checkable
class Corpus(Protocol):
    """Passages in a fixed order, from any cursors, in one pass over the data: segments rise."""

    def read(self, segments: Iterable[Segment]) -> Iterator[tuple[Cursor, Passage]]: ...


def by_record(
    records: Callable[[int], Iterator[tuple[int, Record]]],
    cut: Callable[[int, Record], list[Passage]],
    segments: Iterable[Segment],
) -> Iterator[tuple[Cursor, Passage]]:
    """The passages that `cut` makes of each record; `records(start)` are numbered, records between segments not cut."""
    stream, held = None, None
    for start, items in segments:
        if stream is None:
            stream = records(start.record)
            held = next(stream, None)
        left = items
        while held is not None and left != 0:
            number, record = held
            made = [] if number < start.record else cut(number, record)
            for within in range(start.within if number == start.record else 0, len(made)):
                yield Cursor(number, within), made[within]
                if left is not None and (left := left - 1) == 0:
                    break
            else:
                held = next(stream, None)


@dataclasses.dataclass(frozen=True)
class Index:
    """What one pass over the data finds before anything is computed: how many passages, and where each shard begins."""

    plan: sae.Plan
    cursors: tuple[Cursor, ...]  # of each shard
    tokens: tuple[int, ...]  # of each shard
    longest: int  # tokens of the longest passage
    skipped: int
    digest: str  # of all passages
    digests: Mapping[int, str]  # of the first so many, where asked for

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        items_per_shard: int,
        first: int = 0,
        seen: Callable[[int, Passage], None] = lambda number, passage: None,
    ) -> "Index":
        """`first`: a count of passages whose digest is wanted; `seen` is called with each passage and its number."""
        total, cursors, tokens, digests = hashlib.sha256(), [], [], {}
        longest = skipped = items = 0
        for cursor, passage in corpus.read([Segment(Cursor(0))]):
            seen(items, passage)
            if items % items_per_shard == 0:
                cursors.append(cursor)
                tokens.append(0)
            mark = passage.digest
            total.update(mark.encode())
            tokens[-1] += len(passage.tokens)
            longest, skipped = max(longest, len(passage.tokens)), skipped + (not passage.tokens)
            items += 1
            if items == first:
                digests[items] = f"sha256:{total.hexdigest()}"
        if skipped == items:
            raise InputError(f"--data, --tasks: found {items} items, {skipped} of them too long, expected some to read")
        plan = sae.Plan(items, items_per_shard)
        digest = f"sha256:{total.hexdigest()}"
        return cls(plan, tuple(cursors), tuple(tokens), longest, skipped, digest, digests)

    def read(self, corpus: Corpus, shards: Iterable[int]) -> Iterator[tuple[int, Passage]]:
        """(item, passage) of these shards, which rise."""
        shards = list(shards)
        segments = [Segment(self.cursors[shard], len(self.plan.items_of(shard))) for shard in shards]
        numbers = (number for shard in shards for number in self.plan.items_of(shard))
        for number, (_, passage) in zip(numbers, corpus.read(segments), strict=True):
            yield number, passage
