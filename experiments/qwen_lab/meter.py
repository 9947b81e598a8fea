"""How far a long run has come and where its time goes: for the progress bar, and for `metrics.jsonl`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EVERY_SECONDS = 10.0


class Meter:
    """Counts of what was done, and seconds by what they were spent on."""

    def __init__(self, tokens: int, log: Callable[[dict[str, Any]], None] = lambda line: None):
        self.all_tokens, self.log = tokens, log
        self.counts: dict[str, int] = dict.fromkeys(("items", "tokens", "generated", "rows", "bytes", "shards"), 0)
        self.spent: dict[str, float] = dict.fromkeys(("computing", "waiting for data", "waiting for writing"), 0.0)
        self.writing = 0.0  # seconds of the thread that writes, beside the others
        self.begin = time.perf_counter()
        self.said = self.begin

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.counts[name] += count

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """The time of a with block, without that of blocks inside it."""
        begin, before = time.perf_counter(), sum(self.spent.values())
        try:
            yield
        finally:
            inside = sum(self.spent.values()) - before
            self.spent[what] += time.perf_counter() - begin - inside

    @property
    def line(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says; shares are of the time since the run began."""
        seconds = max(time.perf_counter() - self.begin, 1e-9)
        rate = self.counts["tokens"] / seconds
        left = (self.all_tokens - self.counts["tokens"]) / rate if rate else None
        shares = {f"share {name}": round(spent / seconds, 4) for name, spent in self.spent.items()}
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(seconds, 3),
            **self.counts,
            "tok_per_s": round(rate, 1),
            "seconds_left": None if left is None else round(left, 1),
            **{name.replace(" ", "_"): share for name, share in shares.items()},
            "share_writing": round(self.writing / seconds, 4),
        }

    @property
    def note(self) -> str:
        """For a progress bar."""
        line = self.line
        speed = f"{line['tok_per_s']:,.0f} tok/s"
        if new := self.counts["generated"]:
            speed = f"{line['tok_per_s']:,.0f} prompt, {new / line['seconds']:,.0f} generated tok/s"
        shares = ", ".join(
            f"{name} {line[f'share_{name}']:.0%}" for name in ("computing", "waiting_for_data", "writing")
        )
        return f"{speed}, {line['bytes'] / 1e6:,.1f} MB, {shares.replace('_', ' ')} "

    def record(self, now: bool = False) -> None:
        """Logs a line, if the last one is old enough."""
        if now or time.perf_counter() - self.said >= EVERY_SECONDS:
            self.said = time.perf_counter()
            self.log(self.line)
