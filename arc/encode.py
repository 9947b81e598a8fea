"""Grids as text and back: small encoders that compose, each an exact inverse of itself.

The text forms are those of the arc24 solution (github.com/ironbar/arc24, encoders.py); its ablation prefers shape and
row numbers. `shape(rows(minimal))` of a 2 x 3 grid:

    ```grid shape: 2x3
    1 012
    2 345
    ```
"""

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final

import numpy as np

from arc.errors import InputError
from arc.grid import COLOUR_NAMES, MAX_SIDE, Grid, as_grid

FENCE = "```"
ARC24_SYMBOLS = "ñò÷ûąćďęĚĞ"  # one Qwen token each
_FILLER = "_"
_DIGITS = {str(digit): digit for digit in range(10)}  # int() also takes other scripts' digits


class Encoder(ABC):
    """`decode(encode(grid))` is the grid; `str(encoder)` is a name that `parse_encoder` reads back."""

    opening = ""  # text that every encoding starts with: what a prompt may already write for the model

    @abstractmethod
    def encode(self, grid: Grid) -> str: ...

    @abstractmethod
    def rows(self, text: str) -> list[list[int]]:
        """Cells as written, of any lengths; InputError where the text is not in this form."""

    @final
    def decode(self, text: str) -> Grid:
        """The grid, or InputError: `arc.parse` is the reader that forgives."""
        return as_grid(self.rows(text), "text")


class LineEncoder(Encoder):
    """One line of text per row of cells."""

    @abstractmethod
    def line(self, cells: list[int], index: int) -> str: ...

    def stem(self, cells: list[int], index: int) -> str:
        """The part of the line that says its cells: all of it, but for padding."""
        return self.line(cells, index)

    @abstractmethod
    def row(self, line: str, index: int) -> list[int]: ...

    @final
    def encode(self, grid: Grid) -> str:
        return "\n".join(self.line(cells, index) for index, cells in enumerate(grid.tolist()))

    @final
    def rows(self, text: str) -> list[list[int]]:
        return [self.row(line, index) for index, line in enumerate(text.split("\n"))]


def _cells(words: list[str] | str, values: dict[str, int], index: int) -> list[int]:
    try:
        return [values[word] for word in words]
    except KeyError as error:
        raise InputError(f"text, row {index}: found {str(error.args[0])[:40]!r}, expected {'|'.join(values)}") from None


@final
@dataclass(frozen=True)
class Minimal(LineEncoder):
    """`012`."""

    def line(self, cells: list[int], index: int) -> str:
        return "".join(map(str, cells))

    def row(self, line: str, index: int) -> list[int]:
        return _cells(line, _DIGITS, index)

    def __str__(self) -> str:
        return "minimal"


@final
@dataclass(frozen=True)
class Separated(LineEncoder):
    """`0|1|2`."""

    separator: str = "|"

    def __post_init__(self):
        if not self.separator or re.search(r"[0-9\n'`]", self.separator):
            raise InputError(f"separator={self.separator!r}: expected text without digits, quotes, fences or line ends")

    def line(self, cells: list[int], index: int) -> str:
        return self.separator.join(map(str, cells))

    def row(self, line: str, index: int) -> list[int]:
        return _cells(line.split(self.separator), _DIGITS, index)

    def __str__(self) -> str:
        return "separated" if self.separator == "|" else f"separated('{self.separator}')"


@final
@dataclass(frozen=True)
class Repeated(LineEncoder):
    """`000111222`: each digit `times` times."""

    times: int = 3

    def __post_init__(self):
        if not 1 <= self.times <= 9:
            raise InputError(f"times={self.times}: expected 1 to 9")

    def line(self, cells: list[int], index: int) -> str:
        return "".join(str(cell) * self.times for cell in cells)

    def row(self, line: str, index: int) -> list[int]:
        parts = [line[start : start + self.times] for start in range(0, len(line), self.times)]
        return _cells(parts, {digit * self.times: value for digit, value in _DIGITS.items()}, index)

    def __str__(self) -> str:
        return "repeated" if self.times == 3 else f"repeated({self.times})"


@final
@dataclass(frozen=True)
class Padded(LineEncoder):
    """`012_______`: every row filled up to one width, so that the cell above stands at one distance in every grid.

    A row that is wider stays as it is.
    """

    width: int = 10

    def __post_init__(self):
        if not 1 <= self.width <= MAX_SIDE:
            raise InputError(f"width={self.width}: expected 1 to {MAX_SIDE}")

    def line(self, cells: list[int], index: int) -> str:
        return self.stem(cells, index).ljust(self.width, _FILLER)

    def stem(self, cells: list[int], index: int) -> str:
        return "".join(map(str, cells))

    def row(self, line: str, index: int) -> list[int]:
        return _cells(line.rstrip(_FILLER), _DIGITS, index)

    def __str__(self) -> str:
        return "padded" if self.width == 10 else f"padded({self.width})"


@final
@dataclass(frozen=True)
class Words(LineEncoder):
    """`Black Blue Red`: the colour words of the BARC data."""

    def line(self, cells: list[int], index: int) -> str:
        return " ".join(COLOUR_NAMES[cell].capitalize() for cell in cells)

    def row(self, line: str, index: int) -> list[int]:
        return _cells(line.split(" "), {name.capitalize(): i for i, name in enumerate(COLOUR_NAMES)}, index)

    def __str__(self) -> str:
        return "words"


@final
@dataclass(frozen=True)
class Symbols(LineEncoder):
    """Every digit of the inner text replaced by a symbol."""

    inner: LineEncoder = field(default_factory=Minimal)
    symbols: str = ARC24_SYMBOLS

    def __post_init__(self):
        if len(self.symbols) != 10 or len(set(self.symbols)) != 10 or re.search(r"[\s'`0-9]", self.symbols):
            raise InputError(f"symbols={self.symbols!r}: expected 10 different ones, no digits, spaces, quotes, fences")
        clash = set(self.symbols) & set(self.inner.encode(np.arange(10, dtype=np.uint8)[:, None].repeat(2, 1)))
        if clash:
            raise InputError(f"symbols={self.symbols!r}: {min(clash)!r} already has a meaning in {self.inner}")

    def line(self, cells: list[int], index: int) -> str:
        return self._written(self.inner.line(cells, index))

    def stem(self, cells: list[int], index: int) -> str:
        return self._written(self.inner.stem(cells, index))

    def _written(self, digits: str) -> str:
        return digits.translate(str.maketrans("0123456789", self.symbols))

    def row(self, line: str, index: int) -> list[int]:
        if digit := re.search("[0-9]", line):
            raise InputError(f"text, row {index}: found {digit[0]!r}, expected one of {self.symbols}")
        return self.inner.row(line.translate(str.maketrans(self.symbols, "0123456789")), index)

    def __str__(self) -> str:
        return f"symbols({self.inner})" if self.symbols == ARC24_SYMBOLS else f"symbols({self.inner}, '{self.symbols}')"


@final
@dataclass(frozen=True)
class Rows(LineEncoder):
    """`1 012`: the row's number, from 1, before each line."""

    inner: LineEncoder = field(default_factory=Minimal)

    def line(self, cells: list[int], index: int) -> str:
        return f"{index + 1} {self.inner.line(cells, index)}"

    def stem(self, cells: list[int], index: int) -> str:
        return f"{index + 1} {self.inner.stem(cells, index)}"

    def row(self, line: str, index: int) -> list[int]:
        number, _, rest = line.partition(" ")
        if number != str(index + 1):
            raise InputError(f"text, row {index}: found row number {number[:40]!r}, expected {index + 1}")
        return self.inner.row(rest, index)

    def __str__(self) -> str:
        return f"rows({self.inner})"


@final
@dataclass(frozen=True)
class Json(Encoder):
    """`[[0, 1, 2], [3, 4, 5]]`."""

    def encode(self, grid: Grid) -> str:
        return json.dumps(grid.tolist())

    def rows(self, text: str) -> list[list[int]]:
        try:
            return as_grid(json.loads(text), "text").tolist()
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"text: found no JSON ({type(error).__name__}), expected a list of rows") from None

    def __str__(self) -> str:
        return "json"


@final
@dataclass(frozen=True)
class Code(Encoder):
    """The inner text in a `grid` code block."""

    inner: LineEncoder | Json = field(default_factory=Minimal)
    opening = FENCE + "grid"

    def encode(self, grid: Grid) -> str:
        return f"{self.opening}\n{self.inner.encode(grid)}\n{FENCE}"

    def rows(self, text: str) -> list[list[int]]:
        head, body = _fenced(text)
        if head != self.opening:
            raise InputError(f"text, line 1: found {head[:40]!r}, expected {self.opening!r}")
        return self.inner.rows(body)

    def __str__(self) -> str:
        return f"code({self.inner})"


@final
@dataclass(frozen=True)
class Shape(Encoder):
    """The inner text in a `grid` code block that declares rows x columns."""

    inner: LineEncoder | Json = field(default_factory=Minimal)
    opening = FENCE + "grid"

    def encode(self, grid: Grid) -> str:
        rows, cols = grid.shape
        return f"{self.opening} shape: {rows}x{cols}\n{self.inner.encode(grid)}\n{FENCE}"

    def rows(self, text: str) -> list[list[int]]:
        head, body = _fenced(text)
        rows = self.inner.rows(body)
        expected = f"{self.opening} shape: {len(rows)}x{len(rows[0])}"
        if head != expected:
            raise InputError(f"text, line 1: found {head[:40]!r}, expected {expected!r} for the rows that follow")
        return rows

    def __str__(self) -> str:
        return f"shape({self.inner})"


def _fenced(text: str) -> tuple[str, str]:
    lines = text.split("\n")
    if len(lines) < 3 or lines[-1] != FENCE:
        raise InputError(f"text: found {len(lines)} lines ending in {lines[-1][:40]!r}, expected a closed code block")
    return lines[0], "\n".join(lines[1:-1])


# name -> class, types of its arguments; arc24's class names are understood too
_KINDS = {
    "minimal": (Minimal, ()), "MinimalGridEncoder": (Minimal, ()),
    "separated": (Separated, (str,)), "GridWithSeparationEncoder": (Separated, (str,)),
    "repeated": (Repeated, (int,)), "RepeatNumberEncoder": (Repeated, (int,)),
    "padded": (Padded, (int,)),
    "words": (Words, ()),
    "json": (Json, ()),
    "symbols": (Symbols, (LineEncoder, str)), "ReplaceNumberEncoder": (Symbols, (LineEncoder, str)),
    "rows": (Rows, (LineEncoder,)), "RowNumberEncoder": (Rows, (LineEncoder,)),
    "code": (Code, (LineEncoder | Json,)), "GridCodeBlockEncoder": (Code, (LineEncoder | Json,)),
    "shape": (Shape, (LineEncoder | Json,)), "GridShapeEncoder": (Shape, (LineEncoder | Json,)),
}  # fmt: skip


def parse_encoder(name: str) -> Encoder:
    """Read `shape(rows(minimal))`, `code(separated(' '))`, or arc24's class names; nothing is evaluated."""
    tokens = re.findall(r"[A-Za-z0-9]+|'[^']*'|\S", name)
    encoder, end = _parse(name, tokens, 0)
    if end != len(tokens) or not isinstance(encoder, Encoder):
        raise InputError(f"encoder {name!r}: expected one name such as 'shape(rows(minimal))'")
    return encoder


def _parse(name: str, tokens: list[str], at: int) -> tuple[object, int]:
    token = tokens[at] if at < len(tokens) else ""
    if token.startswith("'") and len(token) > 1:
        return token[1:-1], at + 1
    if re.fullmatch("0|[1-9][0-9]?", token):
        return int(token), at + 1
    if token not in _KINDS:
        names = ", ".join(kind for kind in _KINDS if kind.islower())
        raise InputError(f"encoder {name!r}: found {token!r}, expected one of {names}")
    arguments, at = [], at + 1
    if tokens[at : at + 1] == ["("]:
        at += 1
        while tokens[at : at + 1] != [")"]:
            argument, at = _parse(name, tokens, at)
            arguments.append(argument)
            if tokens[at : at + 1] == [","]:
                at += 1
        at += 1
    kind, types = _KINDS[token]
    if len(arguments) > len(types) or not all(map(isinstance, arguments, types)):
        raise InputError(f"encoder {name!r}: {token} does not take ({', '.join(map(str, arguments))})")
    return kind(*arguments), at


DEFAULT_ENCODER = "shape(rows(minimal))"
ENCODERS: dict[str, Encoder] = {
    name: parse_encoder(name)
    for name in (
        "minimal", "separated", "repeated", "padded", "symbols(minimal)", "words", "json", "rows(minimal)", "code(minimal)",
        "code(json)", "shape(minimal)", "shape(words)", "shape(rows(symbols(minimal)))", DEFAULT_ENCODER,
    )
}  # fmt: skip


def as_encoder(encoder: str | Encoder) -> Encoder:
    """A name becomes its encoder; an encoder passes through."""
    return (ENCODERS.get(encoder) or parse_encoder(encoder)) if isinstance(encoder, str) else encoder
