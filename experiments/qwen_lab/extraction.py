"""Items in, shards out: read forward, or first written by the model, many at a time, and then read forward.

What is stored of an item depends on the item alone: not on what was computed beside it, on a resumption, or on how
many workers share a plan. Generated tokens are checked by the pass that stores them: where another batch rounds a tie
otherwise, the pass decides.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

import qwen_eqx
import sae
from qwen_eqx.text.ids import bucket
from qwen_lab import choosing, completions, puzzles, stopping
from qwen_lab.choosing import Choice, Read
from qwen_lab.errors import RunError
from qwen_lab.meter import Meter
from qwen_lab.passages import Passage
from qwen_lab.reading import Pass, Reader
from qwen_lab.writing import Shards

IN_FLIGHT = 4  # shards that may wait for a batch of their last items to fill
Items = Iterable[tuple[int, Passage]]
Advance = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Extraction:
    """A model, the rows that are wanted of what it computes, and where they go."""

    reader: Reader
    tokenizer: qwen_eqx.Tokenizer
    choice: Choice
    shards: Shards
    meter: Meter
    advance: Advance

    @property
    def columns(self) -> tuple[str, ...]:
        return self.shards.writer.manifest.columns

    def forward(self, items: Items) -> None:
        """Reads every item as it stands, those of one width together."""
        waiting: dict[int, list[tuple[int, Passage]]] = collections.defaultdict(list)
        running: collections.deque[tuple[list[tuple[int, Passage]], Pass]] = collections.deque()

        def launch(width: int) -> None:
            batch = waiting.pop(width)
            with self.meter.timed("computing"):
                running.append((batch, self.reader.start([passage.tokens for _, passage in batch], width)))
            if len(running) > 1:  # the next one is computed while this one is looked at
                finish()

        def finish() -> None:
            batch, out = running.popleft()
            out = self._wait(out)
            for row, (number, passage) in enumerate(batch):
                self._keep(Read(number, passage.tokens, passage.prompt), out, row, passage, passage.said)

        for number, passage in self._arriving(items):
            width = self.reader.width(len(passage.tokens))
            waiting[width].append((number, passage))
            if len(waiting[width]) == self.reader.rows(width):
                launch(width)
            oldest = min(waiting, key=lambda width: waiting[width][0][0], default=None)
            if oldest is not None and self._shards_between(waiting[oldest][0][0], number) >= IN_FLIGHT:
                launch(oldest)
        for width in sorted(waiting):
            launch(width)
        while running:
            finish()

    def generate(self, items: Items, *, slots: int, max_new_tokens: int, longest: int) -> None:
        """Lets the model answer every item, `slots` at a time; `longest` is the tokens of the longest prompt."""
        entered: dict[int, tuple[int, Passage]] = {}

        def prompts() -> Iterator[list[int]]:
            for place, (number, passage) in enumerate(self._arriving(items)):
                entered[place] = number, passage
                yield passage.tokens

        finished = qwen_eqx.schedule(
            self.reader.model,
            prompts(),
            slots=slots,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=min(bucket(longest), self.reader.model.config.max_seq - max_new_tokens),
            stop_tokens=self.tokenizer.eos_ids,
            pad_token=self.tokenizer.pad_id,
        )
        while True:
            with self.meter.timed("computing"):
                done = next(finished, None)
            if done is None:
                return
            self._answered(*entered.pop(done.item), done.tokens.tolist(), max_new_tokens)

    def _arriving(self, items: Items) -> Iterator[tuple[int, Passage]]:
        """The items that are read; those that are skipped are recorded at once."""
        arriving = iter(items)
        while True:
            stopping.check()
            with self.meter.timed("waiting for data"):
                number, passage = next(arriving, (0, None))
            if passage is None:
                return
            if passage.tokens:
                yield number, passage
            else:
                self._add(
                    number, sae.Rows.none(self.shards.writer.manifest), {**passage.said, "digest": passage.digest}
                )

    def _answered(self, number: int, passage: Passage, tokens: list[int], most: int) -> None:
        """Stores an item with what the model wrote, once a pass over both says the same."""
        assert passage.asked is not None
        tokens, out = self._settled(passage.tokens, tokens, most)
        sample = completions.as_sample(
            passage.asked.request, np.asarray(tokens, np.int32), float(out.log_probs[0, : len(tokens)].sum()),
            self.tokenizer,
        )  # fmt: skip
        said = {
            "tokens": len(tokens),
            "log_prob": round(sample.completion.log_prob, 6),
            "text": sample.completion.text,
            "outcome": completions.outcome(sample, passage.asked.task),
        }
        self.meter.add(generated=len(tokens))
        answered = puzzles.answered(passage.asked, tokens, sample.parsed.grid, {}, self.tokenizer)
        read = Read(number, [*passage.tokens, *tokens[:-1]], len(passage.tokens))
        self._keep(read, out, 0, dataclasses.replace(passage, marks=answered.marks), {**passage.said, **said})

    def _settled(self, prompt: list[int], tokens: list[int], most: int) -> tuple[list[int], Pass]:
        """The tokens that one pass over prompt and tokens chooses, token after token, and that pass."""
        width = self.reader.width(len(prompt) + most - 1)  # not of what is read now: the same whatever was written
        while True:
            with self.meter.timed("computing"):
                out = self.reader.start([[*prompt, *tokens[:-1]]], width, [len(prompt)], most)
            out = self._wait(out)
            best = out.best[0, : len(tokens)].tolist()
            wrong = next((at for at, (own, other) in enumerate(zip(best, tokens, strict=True)) if own != other), None)
            if wrong is None:
                return tokens, out
            tokens = [*tokens[:wrong], best[wrong]]
            if tokens[-1] in self.tokenizer.eos_ids or len(tokens) == most:
                return tokens, out
            with self.meter.timed("computing"):
                left = most - len(tokens)
                room = min(bucket(left), self.reader.model.config.max_seq - len(prompt) - len(tokens))
                more = completions.generate(self.reader.model, self.tokenizer, [[*prompt, *tokens]], room)
                tokens += completions.tokens_of(more, 0)[:left].tolist()

    def _wait(self, out: Pass) -> Pass:
        """What was computed, on the host."""
        with self.meter.timed("computing"):
            out = jax.device_get(out)
        stopping.check()
        return out

    def _keep(self, read: Read, out: Pass, row: int, passage: Passage, said: Any) -> None:
        """Hands the wanted rows of an item on, unless something in them is no number."""
        length = len(read.tokens)
        finite = out.finite[:, row, :length]
        if not finite.all():
            site, position = np.argwhere(~finite)[0]
            place = f"{self.reader.sites[site]}, position {position}"
            raise RunError(
                f"item {read.number} ({passage.name}): found NaN or infinity at {place}, expected finite activations; the "
                "shards that are whole are kept"
            )
        if passage.marks is not None and (self.columns or self.choice.positions in choosing.NEED_MARKS):
            pairs = 0 if passage.asked is None else len(passage.asked.task.train)
            read = dataclasses.replace(read, marks=passage.marks().first(length), pairs=pairs)
        kept = self.choice.keep(read, np.asarray(out.norms)[:, row, :length])
        values = [np.asarray(value)[row] for value in out.values]
        self._add(
            read.number, choosing.rows_of(read, kept, values, self.columns), {**said, "digest": passage.digest},
            len(passage.tokens),
        )  # fmt: skip

    def _add(self, number: int, rows: Any, said: Any, tokens: int = 0) -> None:
        with self.meter.timed("waiting for writing"):
            self.shards.add(number, rows, said)
        self.meter.add(items=1, tokens=tokens, rows=len(rows.item), bytes=rows.activations.nbytes)
        self.advance(1, self.meter.note)
        self.meter.record()

    def _shards_between(self, first: int, last: int) -> int:
        size = self.shards.writer.plan.items_per_shard
        return last // size - first // size
