"""Which positions of an item become rows of a store, and how many bytes they take: a function of the item alone."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32

import sae
from qwen_lab.errors import InputError
from qwen_lab.marks import Marks
from sae.files import numpy_dtype

Positions = Literal["all", "generated", "prompt", "test-input", "cells"]
NEED_MARKS = ("test-input", "cells")


@dataclasses.dataclass(frozen=True)
class Read:
    """One item as it was read: what stands at each position, and what each is."""

    number: int
    tokens: list[int]
    prompt: int | None  # tokens before the answer; None: no answer is among them
    marks: Marks | None = None
    pairs: int = 0  # training pairs of the task

    @property
    def generated(self) -> Bool[np.ndarray, " seq"]:
        """Where the logits chose, or are to choose, a token of the answer: from the prompt's last position on."""
        places = np.arange(len(self.tokens))
        return places >= (len(self.tokens) if self.prompt is None else self.prompt - 1)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The rules; each leaves out of what those before it kept, and the sample is drawn from what is left."""

    positions: Positions = "all"
    exclude_tokens: tuple[int, ...] = ()
    sink_times: float = 0.0  # 0 keeps all
    sample_rows: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sample_rows <= 1:
            raise InputError(f"--sample-rows: found {self.sample_rows}, expected a fraction above 0 and at most 1")

    def keep(self, read: Read, norms: Float32[np.ndarray, "sites seq"] | None = None) -> np.ndarray:
        """The positions of an item that are kept, rising.

        A sink's norm exceeds `sink_times` medians of the item's own at some site. The sample is drawn from (seed, item),
        so it is the same whatever is computed beside.
        """
        kept = self._of_kind(read)
        if self.exclude_tokens:
            kept &= ~np.isin(read.tokens, self.exclude_tokens)
        if self.sink_times and norms is not None:
            kept &= (norms <= self.sink_times * np.median(norms, axis=1, keepdims=True)).all(axis=0)
        places = np.flatnonzero(kept)
        if self.sample_rows == 1:
            return places
        rng = np.random.default_rng([self.seed, read.number])
        count = int(np.ceil(self.sample_rows * len(places)))
        return np.sort(rng.permutation(places)[:count])

    def _of_kind(self, read: Read) -> Bool[np.ndarray, " seq"]:
        places = np.arange(len(read.tokens))
        match self.positions:
            case "all":
                return np.ones(len(places), bool)
            case "generated":
                return read.generated
            case "prompt":
                return places < (len(places) if read.prompt is None else read.prompt)
        if read.marks is None:
            raise InputError(f"--positions {self.positions}: found texts, expected ARC tasks: texts have no cells")
        inside = read.marks.part > 0
        return (
            inside & (read.marks.part == 1) & (read.marks.pair >= read.pairs) if self.positions != "cells" else inside
        )

    @property
    def keeps_all_kinds(self) -> bool:
        """Whether nothing but the sample leaves positions out."""
        return self.positions == "all" and not self.exclude_tokens and not self.sink_times

    def rows_at_most(self, tokens: int, new: int = 0) -> int:
        """Of so many tokens, and so many that may be generated after them."""
        read = {"generated": new, "prompt": tokens}.get(self.positions, tokens + new)
        return int(np.ceil(self.sample_rows * read))


def rows_of(read: Read, kept: np.ndarray, values: Sequence[np.ndarray], columns: Sequence[str]) -> sae.Rows:
    """The kept rows of an item; `values` are what stands at each position, site by site."""
    activations = np.empty((len(kept), len(values), values[0].shape[-1]), values[0].dtype)
    for site, value in enumerate(values):
        activations[:, site] = value[kept]
    marks = read.marks or Marks.of([None] * len(read.tokens))
    return sae.Rows(
        activations=activations,
        token_ids=np.asarray(read.tokens, np.int32)[kept],
        positions=kept.astype(np.int32),
        item=np.full(len(kept), read.number, np.int32),
        generated=read.generated[kept],
        **{name: getattr(marks, name)[kept] for name in columns},
    )


def marked(rows: sae.Rows, read: Read, choice: Choice) -> sae.Rows:
    """Rows of an item that were captured while it was generated: those that are kept, with the cells that they stand in."""
    places = np.asarray(rows.positions)
    kept = np.flatnonzero(np.isin(places, choice.keep(read)))
    chosen = {name: np.asarray(column)[kept] for name, column in rows.columns.items()}
    marks = read.marks or Marks.of([None] * len(read.tokens))
    return sae.Rows(**chosen, **{name: column[places[kept]] for name, column in marks._asdict().items()})


def bytes_per_row(manifest: sae.Manifest) -> int:
    """Of all tensors of a shard together."""
    layout = manifest.layout(1)
    return sum(numpy_dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in layout.values())
