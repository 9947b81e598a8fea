"""Rectangles and captions, drawn once and written as SVG or PNG."""

import struct
import zlib
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import numpy as np

# 3 x 5 dots per character, rows from the top, three bits each: captions in PNG need no font
_FONT = {
    "0": 0o75557, "1": 0o26227, "2": 0o71747, "3": 0o71717, "4": 0o55711, "5": 0o74717, "6": 0o74757, "7": 0o71111,
    "8": 0o75757, "9": 0o75717, "a": 0o75755, "b": 0o65656, "c": 0o74447, "d": 0o65556, "e": 0o74647, "f": 0o74644,
    "g": 0o74557, "h": 0o55755, "i": 0o72227, "j": 0o11157, "k": 0o55655, "l": 0o44447, "m": 0o57755, "n": 0o65555,
    "o": 0o75557, "p": 0o75744, "q": 0o75571, "r": 0o75655, "s": 0o74717, "t": 0o72222, "u": 0o55557, "v": 0o55552,
    "w": 0o55775, "x": 0o55255, "y": 0o55222, "z": 0o71247, "-": 0o00700, "_": 0o00007, ".": 0o00002, ",": 0o00024,
    ":": 0o02020, "/": 0o11244, "(": 0o12221, ")": 0o42224, "%": 0o51245, "+": 0o02720, "=": 0o07070, "#": 0o57575,
    "?": 0o71202, "!": 0o22202,
}  # fmt: skip


@dataclass
class Canvas:
    """A page measured in pixels, origin at the top left."""

    width: int
    height: int
    background: str = "#ffffff"
    _rects: list[tuple[int, int, int, int, str]] = field(default_factory=list)
    _texts: list[tuple[int, int, int, str, str]] = field(default_factory=list)

    def rect(self, x: int, y: int, width: int, height: int, colour: str) -> None:
        self._rects.append((x, y, width, height, colour))

    def frame(self, x: int, y: int, width: int, height: int, colour: str, thick: int) -> None:
        """The inside edge of a rectangle."""
        for strip in ((x, y, width, thick), (x, y + height - thick, width, thick)):
            self.rect(*strip, colour)
        for strip in ((x, y, thick, height), (x + width - thick, y, thick, height)):
            self.rect(*strip, colour)

    def text(self, x: int, y: int, size: int, text: str, colour: str = "#222222") -> None:
        """A caption whose top left is (x, y), `size` pixels high."""
        self._texts.append((x, y, size, text, colour))

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}"'
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {self.width} {self.height}">']
        parts.append(f'<rect {size} fill="{self.background}"/>')
        parts += [f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{c}"/>' for x, y, w, h, c in self._rects]
        parts += [
            f'<text x="{x}" y="{y + s}" font-family="monospace" font-size="{s}" fill="{c}">{escape(_clean(t))}</text>'
            for x, y, s, t, c in self._texts
        ]
        return "\n".join([*parts, "</svg>\n"])

    def pixels(self) -> np.ndarray:
        """Height x width x 3 bytes."""
        image = np.empty((self.height, self.width, 3), np.uint8)
        image[:] = rgb(self.background)
        for x, y, width, height, colour in self._rects:
            image[y : y + height, x : x + width] = rgb(colour)
        for x, y, size, text, colour in self._texts:
            dot = max(1, size // 6)
            for place, letter in enumerate(text.lower()):
                bits = _FONT.get(letter, 0 if letter == " " else _FONT["?"])
                for bit in range(15):
                    if bits >> (14 - bit) & 1:
                        left, top = x + (place * 4 + bit % 3) * dot, y + (bit // 3) * dot
                        image[top : top + dot, left : left + dot] = rgb(colour)
        return image

    def png(self) -> bytes:
        """The PNG file, 8-bit RGB (PNG specification, second edition, sec. 5)."""
        rows = self.pixels().reshape(self.height, -1)
        raw = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # each row starts with filter type 0
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )


def _clean(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)  # XML holds no control characters


def rgb(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` as three bytes."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
