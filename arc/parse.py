"""What a model said, to a Grid or a reason why not. A malformed answer is data: nothing here raises on any text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from arc.encode import DEFAULT_ENCODER, Code, Encoder, Json, LineEncoder, Shape, as_encoder
from arc.errors import InputError
from arc.grid import MAX_SIDE, Grid, as_grid, size_of

Reason = Literal["nothing", "no grid", "cut off", "bad row", "ragged", "wrong shape", "too large"]
MAX_CANDIDATES = 64  # nobody looks further into what a model rambled
_END = re.compile(r"<\|(?:im_end|endoftext|eot_id|end|end_of_text)\|>|</s>")
_SHAPE = re.compile(r"shape:\s*(\d{1,3})\s*x\s*(\d{1,3})\b")
_FENCE = re.compile(r"```([^\n`]*)")
_JSON = re.compile(r"\[\s*\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*\s*\]")


@dataclass(frozen=True)
class Parsed:
    """A grid, or the reason there is none with a sentence about it; `notes` say what had to be forgiven."""

    grid: Grid | None = None
    reason: Reason | None = None
    detail: str = ""
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        found = size_of(self.grid) if self.grid is not None else f"{self.reason}: {self.detail:.60}"
        return f"Parsed({found}{f', {len(self.notes)} notes' if self.notes else ''})"

    def noted(self, *notes: str) -> "Parsed":
        return Parsed(self.grid, self.reason, self.detail, notes + self.notes)


def parse(text: str, encoder: str | Encoder = DEFAULT_ENCODER, begun: str = "") -> Parsed:
    """The first grid in `begun + text`, where `begun` is the part of the answer that the prompt already held.

    The first block that gives a grid counts; a base model that runs on writes further examples after it.
    """
    said = _END.split(text, maxsplit=1)[0]
    if not said.strip():
        return Parsed(reason="nothing", detail="the completion is empty")
    blocks = islice(candidates(begun + said, as_encoder(encoder)), MAX_CANDIDATES)
    failure = None
    for number, parsed in enumerate(blocks, 1):
        if parsed.grid is None:
            failure = failure or parsed
            continue
        notes = (f"taken from block {number}",) if number > 1 else ()
        notes += ("a further block follows",) if next(blocks, None) is not None else ()
        return parsed.noted(*notes)
    return failure or Parsed(reason="no grid", detail="no line looks like a row of a grid")


def candidates(text: str, encoder: Encoder) -> Iterator[Parsed]:
    """Every block of the text that was meant as a grid, in order."""
    text = text.replace("\r\n", "\n")
    inner, fenced = (encoder.inner, True) if isinstance(encoder, Code | Shape) else (encoder, False)
    blocks = _fenced_blocks(text) if fenced else []
    notes = ("no code block",) if fenced else ()
    if blocks:
        yield from (_block(body, inner, head, closed) for head, body, closed in blocks)
    elif isinstance(inner, LineEncoder):
        yield from (_grid(run).noted(*notes) for run in _runs(text, inner))
    elif isinstance(inner, Json):
        yield from (_grid(_json_rows(match[0], inner)).noted(*notes) for match in _JSON.finditer(text))
    else:  # somebody's own encoder: only it knows what its text looks like
        try:
            yield Parsed(inner.decode(text.strip()))
        except InputError as error:
            yield Parsed(reason="no grid", detail=str(error))


def _fenced_blocks(text: str) -> list[tuple[str, str, bool]]:
    """(text after the fence, body, closed?) per code block; only the `grid` blocks where there are any."""
    fences = list(_FENCE.finditer(text))
    blocks: list[tuple[str, str, bool]] = []
    is_open = False
    for index, fence in enumerate(fences):
        if is_open and not fence[1].startswith("grid"):
            is_open = False  # this one closed the block before
            continue
        is_open = True
        follows = fences[index + 1] if index + 1 < len(fences) else None
        body = text[fence.end() : follows.start() if follows else len(text)]
        blocks.append((fence[1], body, follows is not None))
    blocks = [block for block in blocks if block[1].strip()] or blocks[:1]  # a fence said twice opens once
    return [block for block in blocks if block[0].startswith("grid")] or blocks


def _block(body: str, inner: Encoder, head: str, closed: bool) -> Parsed:
    declared = _SHAPE.search(head)
    shape = (int(declared[1]), int(declared[2])) if declared else None
    notes = () if closed else ("block not closed",)
    if shape is not None and not all(1 <= side <= MAX_SIDE for side in shape):
        return Parsed(reason="too large", detail=f"declared {shape[0]} x {shape[1]}, a side is 1 to {MAX_SIDE}")
    if not body.strip():
        return Parsed(reason="no grid" if closed else "cut off", detail="the block holds no rows")
    if isinstance(inner, Json):
        match = _JSON.search(body)
        if match is None:
            return Parsed(reason="no grid" if closed else "cut off", detail="no list of lists in the block")
        return _fit(_json_rows(match[0], inner), shape, closed).noted(*notes)
    if not isinstance(inner, LineEncoder):
        return Parsed(reason="no grid", detail=f"cannot look for {inner} in a block")
    return _lines(body.strip("\n").split("\n"), inner, shape, closed).noted(*notes)


def _lines(lines: list[str], inner: LineEncoder, shape: tuple[int, int] | None, closed: bool) -> Parsed:
    limit = MAX_SIDE if shape is None else shape[0]
    rows: list[list[int]] = []
    for index, line in enumerate(lines[: limit + 1]):
        last = index == len(lines) - 1
        try:
            row = inner.row(line.strip(), index)
        except InputError as error:
            if shape is not None and index >= shape[0]:
                break  # run on beyond the declared rows
            cut = last and not closed
            return Parsed(reason="cut off" if cut else "bad row", detail=str(error).removeprefix("text, "))
        rows.append(row)
    notes = () if shape is None or len(lines) <= shape[0] else (f"{len(lines) - shape[0]} lines beyond the shape",)
    if shape is None and len(lines) > MAX_SIDE:
        return Parsed(reason="too large", detail=f"{len(lines)} lines, a grid has at most {MAX_SIDE}")
    return _fit(rows, shape, closed).noted(*notes)


def _fit(rows: list[list[int]] | str, shape: tuple[int, int] | None, closed: bool) -> Parsed:
    """Trim run-on rows to the declared shape; what is missing stays missing."""
    if isinstance(rows, str):
        return Parsed(reason="bad row", detail=rows)
    if shape is None:
        return _grid(rows, closed)
    height, width = shape
    notes = ("rows trimmed to the shape",) if any(len(row) > width for row in rows[:height]) else ()
    trimmed = [row[:width] for row in rows[:height]]
    short = next((index for index, row in enumerate(trimmed) if len(row) < width), None)
    if short is not None:
        cut = not closed and short == len(rows) - 1
        detail = f"row {short} has {len(trimmed[short])} cells, the shape says {width}"
        return Parsed(reason="cut off" if cut else "wrong shape", detail=detail)
    if len(trimmed) < height:
        detail = f"{len(trimmed)} rows, the shape says {height}"
        return Parsed(reason="wrong shape" if closed else "cut off", detail=detail)
    return Parsed(as_grid(trimmed), notes=notes)


def _grid(rows: list[list[int]] | str, closed: bool = True) -> Parsed:
    if isinstance(rows, str):
        return Parsed(reason="bad row", detail=rows)
    widths = [len(row) for row in rows]
    if len(set(widths)) > 1:
        cut = not closed and len(set(widths[:-1])) == 1 and widths[-1] < widths[0]
        return Parsed(reason="cut off" if cut else "ragged", detail=f"rows of {min(widths)} to {max(widths)} cells")
    if widths[0] == 0:
        return Parsed(reason="no grid", detail="rows without cells")
    if len(rows) > MAX_SIDE or widths[0] > MAX_SIDE:
        return Parsed(reason="too large", detail=f"{len(rows)} x {widths[0]} cells, a side is at most {MAX_SIDE}")
    return Parsed(as_grid(rows))


def _json_rows(text: str, inner: Json) -> list[list[int]] | str:
    try:
        return inner.rows(text)
    except InputError as error:
        return str(error)


def _runs(text: str, inner: LineEncoder) -> Iterator[list[list[int]]]:
    """Runs of lines that read as rows 0, 1, 2 …"""
    run: list[list[int]] = []
    for line in text.split("\n"):
        row = _row_or_none(inner, line.strip(), len(run))
        if row is None and run:
            yield run
            run = []
            row = _row_or_none(inner, line.strip(), 0)
        if row:
            run.append(row)
    if run:
        yield run


def _row_or_none(inner: LineEncoder, line: str, index: int) -> list[int] | None:
    try:
        return inner.row(line, index) or None
    except InputError:
        return None
