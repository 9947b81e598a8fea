"""A task as the text a model is asked to continue.

`output-from-examples-v0` and `-v1` are the formats of the arc24 solution (github.com/ironbar/arc24, prompting.py), byte
for byte; fine-tuned checkpoints of that family know no other.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from arc.encode import DEFAULT_ENCODER, Encoder, as_encoder
from arc.errors import InputError
from arc.grid import Grid, size_of
from arc.spans import Cell, Marked, Part, cells_of, unmarked
from arc.task import Task

_PRIORS_V0 = """\
- Objectness: Objects persist and cannot appear or disappear without reason. Objects can interact or not depending on \
the circumstances.
- Goal-directed: Objects can be animate or inanimate. Some objects are "agents" - they have intentions and they pursue \
goals.
- Numbers & counting: Objects can be counted or sorted by their shape, appearance, or movement using basic mathematics \
like addition, subtraction, and comparison.
- Basic geometry & topology: Objects can be shapes like rectangles, triangles, and circles which can be mirrored, \
rotated, translated, deformed, combined, repeated, etc. Differences in distances can be detected.
"""

# Three lines of the original end in a space: written as \x20, for editors strip spaces that close a line.
_SYSTEM_V0 = f"""\
You are a helpful AI assistant. Your job is to solve tasks from the Abstraction and Reasoning Challenge (ARC).\x20
The user will present you with sample input and output grids for each task.\x20
Your job will be to understand the transformation between the input and the output and apply it to the last input grid \
given by the user.\x20
The puzzle-like inputs and outputs present a grid where each square can be one of ten colors. A grid can be any height \
or width between 1x1 and 30x30.
The background of the grid is typically colored with 0.
The tasks from ARC are based on the following priors:

{_PRIORS_V0}
The transformations between input and output should be based on these priors.
"""

_INTRO_V0 = """\
Let's see if you can solve this simple ARC task. These are some input-output grid examples that define the task.
"""

_INTRO_V1 = """\
Let's see if you can solve this simple Abstraction and Reasoning Challenge (ARC) task.
Below there are some input-output grid examples that define the task.
Your job is to understand the transformation between the input and the output and apply it to the test input grid.
The transformations are always based on the following priors: objectness, goal-directed, numbers & counting, and basic \
geometry & topology.
"""


@dataclass(frozen=True)
class PromptFormat:
    """The fixed text around the grids; `{index}`, `{input}` and `{output}` are the only fields."""

    system: str | None
    intro: str
    example: str
    test: str
    answer: str
    """What the assistant writes before its grid."""

    def user(self, task: Task, test: int, encoder: Encoder) -> str:
        parts = [self.intro]
        for index, pair in enumerate(task.train, 1):
            assert pair.output is not None  # Task holds no training pair without one
            fields = {"input": encoder.encode(pair.input), "output": encoder.encode(pair.output)}
            parts.append(self.example.format(index=index, **fields))
        parts.append(self.test.format(input=encoder.encode(task.test[test].input)))
        return "".join(parts)


_EXAMPLE = "\n## Example {index}\n\n### Input\n\n{input}\n\n### Output\n\n{output}\n"
_TEST = "\n## Test case\n\n### Input\n\n{input}"
_ANSWER = "### Output\n\n"

DEFAULT_PROMPT = "output-from-examples-v1"
PROMPTS: dict[str, PromptFormat] = {
    "output-from-examples-v0": PromptFormat(_SYSTEM_V0, _INTRO_V0, _EXAMPLE, _TEST, _ANSWER),
    "output-from-examples-v1": PromptFormat("You are a helpful assistant.", _INTRO_V1, _EXAMPLE, _TEST, _ANSWER),
    "compact": PromptFormat(None, "", "I\n{input}\n\nO\n{output}\n\n", "I\n{input}", "O\n"),
}


def as_format(format: str | PromptFormat) -> PromptFormat:
    """A name becomes its format; a format passes through."""
    if isinstance(format, PromptFormat):
        return format
    if format not in PROMPTS:
        raise InputError(f"prompt format: found {format!r}, expected one of {', '.join(PROMPTS)}")
    return PROMPTS[format]


def chat_messages(
    task: Task, test: int = 0, encoder: str | Encoder = DEFAULT_ENCODER, format: str | PromptFormat = DEFAULT_PROMPT
) -> list[dict[str, str]]:
    """The messages up to the assistant's turn, for any chat template; test inputs are asked one at a time."""
    format = as_format(format)
    if not 0 <= test < len(task.test):
        raise InputError(f"task {task.id}: test={test}, expected 0 to {len(task.test) - 1}")
    system = [] if format.system is None else [{"role": "system", "content": format.system}]
    return [*system, {"role": "user", "content": format.user(task, test, as_encoder(encoder))}]


def prefill(encoder: str | Encoder = DEFAULT_ENCODER, format: str | PromptFormat = DEFAULT_PROMPT) -> str:
    """What is already written of the assistant's turn: the heading, and the opening fence where the encoder has one."""
    return as_format(format).answer + as_encoder(encoder).opening


def answer(grid: Grid, encoder: str | Encoder = DEFAULT_ENCODER, format: str | PromptFormat = DEFAULT_PROMPT) -> str:
    """The whole of a right assistant's turn; it starts with `prefill`."""
    return as_format(format).answer + as_encoder(encoder).encode(grid)


def prompt_text(messages: list[dict[str, str]], begun: str = "", template: Callable[..., str] | None = None) -> str:
    """The text to complete, by `template(messages, add_generation_prompt=True)` or, without one, the bare contents."""
    if template is not None:
        return template(messages, add_generation_prompt=True) + begun
    return "".join(message["content"].rstrip("\n") + "\n\n" for message in messages) + begun


class PlacedGrid(NamedTuple):
    """A grid of a prompt, and the character at which its text starts."""

    pair: int
    part: Part
    grid: Grid
    start: int
    encoder: Encoder

    def __repr__(self) -> str:
        return f"PlacedGrid(pair {self.pair}, {self.part}, {size_of(self.grid)} at {self.start})"

    def cells(self) -> list[Cell]:
        return cells_of(self.encoder, self.grid, self.pair, self.part, self.start)


@dataclass(frozen=True)
class Prompt:
    """One test input of a task, ready to complete."""

    text: str
    begun: str
    """The end of `text` that is already part of the answer: `arc.parse` wants it back."""
    dropped: tuple[int, ...]
    """Training pairs of the task left out to fit the budget."""
    length: int | None
    """In the units of the budget, where one was given."""
    grids: tuple[PlacedGrid, ...] | None = None
    """Where each grid's text starts; None where a template does not leave the grids as they were written."""

    def __repr__(self) -> str:
        end = f"{len(self.text):,} characters, ending {self.text[-24:]!r}"
        return f"Prompt({end}, dropped {len(self.dropped)} pairs, length {self.length})"

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell of every grid in `text`, in the order in which they stand there."""
        if self.grids is None:
            raise InputError(
                "template: found one that does not leave the grids as they were written, expected them whole: no cells"
            )
        return tuple(cell for grid in self.grids for cell in grid.cells())


class TooLong(InputError):
    """A prompt that does not fit its budget even with one training pair."""


def build(
    task: Task,
    test: int = 0,
    *,
    encoder: str | Encoder = DEFAULT_ENCODER,
    format: str | PromptFormat = DEFAULT_PROMPT,
    template: Callable[..., str] | None = None,
    begin: bool = True,
    count: Callable[[str], int] | None = None,
    budget: int | None = None,
) -> Prompt:
    """The prompt, with fewer training pairs where `count(text)` exceeds `budget`.

    The longest pair goes first, so as many as possible stay; no grid is ever cut, the test input always stays, and a
    task that does not fit even with one pair raises TooLong.
    """
    if (count is None) != (budget is None):
        raise InputError("budget: found only one of count and budget, expected both or none")
    encoder, format = as_encoder(encoder), as_format(format)
    begun = prefill(encoder, format) if begin else ""
    lengths = [len(encoder.encode(pair.input)) + len(encoder.encode(pair.output)) for pair in task.train]  # type: ignore
    kept = list(range(len(task.train)))
    while True:
        part = replace(task, train=tuple(task.train[index] for index in kept))
        text = prompt_text(chat_messages(part, test, encoder, format), begun, template)
        length = None if count is None else count(text)
        if length is None or budget is None or length <= budget:
            dropped = tuple(index for index in range(len(task.train)) if index not in kept)
            marked = prompt_text(chat_messages(part, test, Marked(encoder), format), begun, template)
            return Prompt(text, begun, dropped, length, _placed(task, (test, kept), encoder, (text, marked)))
        if len(kept) == 1:
            raise TooLong(f"task {task.id}, test {test}: found length {length} with one pair, expected {budget}")
        kept.remove(max(kept, key=lambda index: (lengths[index], index)))


def _placed(
    task: Task, asked: tuple[int, list[int]], encoder: Encoder, texts: tuple[str, str]
) -> tuple[PlacedGrid, ...] | None:
    """The grids of a prompt by the marks in its marked twin; `asked`: the test, and the training pairs kept."""
    (test, kept), (text, marked) = asked, texts
    plain, starts = unmarked(marked)
    grids: list[tuple[int, Part, Grid]] = []
    for index in kept:
        pair = task.train[index]
        assert pair.output is not None  # Task holds no training pair without one
        grids.append((index, "input", pair.input))
        grids.append((index, "output", pair.output))
    grids.append((len(task.train) + test, "input", task.test[test].input))
    if plain != text or len(starts) != len(grids):
        return None
    placed = tuple(PlacedGrid(*grid, start, encoder) for grid, start in zip(grids, starts, strict=True))
    return placed if all(text.startswith(encoder.encode(each.grid), each.start) for each in placed) else None
