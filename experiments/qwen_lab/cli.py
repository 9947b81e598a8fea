"""A command's edge: typed flags in, an exit code out, and what is shown in between."""

import io
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn, TypeVar

import jax
import rich.progress
from rich.console import Console
from rich.markup import escape

from qwen_lab import allocation, bounds, files, flags, hosts, joining, stopping
from qwen_lab.errors import INPUT_ERRORS, InputError, RunError, full, wrong_name
from sae.errors import StorageFailed

DONE, BROKE, BAD_INPUT = 0, 1, 2

DEMOS = {
    "tiny-arc": "is a small model trained on made-up puzzles with grids of 3 to 6 a side; of others it solves few.",
    "tiny-random": "has random weights: it shows that everything runs, its answers mean nothing.",
}
_PAUSE = 0.2  # seconds between two states of a bar in a notebook
console = Console(highlight=False, soft_wrap=True)
ConfigT = TypeVar("ConfigT")
ItemT = TypeVar("ItemT")


def run(main: Callable[[ConfigT], None], config: type[ConfigT]) -> None:
    """Parses flags into `config`, runs `main`, and exits: 0 done, 1 broke, 2 wrong input, 75 stopped, 130 interrupted."""
    try:
        arguments = flags.parse(config, sys.modules[main.__module__].__doc__)
    except InputError as error:
        _fail(BAD_INPUT, f"error: {error}")
    try:
        with nullcontext() if stopping.installed() else stopping.held():
            allocation.begin()
            bounds.check(arguments)
            hosts.take_devices(arguments)
            if not (isinstance(arguments, hosts.Together) and hosts.Hosts.of(arguments)):  # those look when they joined
                check_platform()
            _keep_compilations()
            main(arguments)
    except INPUT_ERRORS as error:
        _fail(BAD_INPUT, f"error: {error}")
    except (RunError, StorageFailed) as error:
        _fail(BROKE, f"error: {error}")
    except stopping.Stopped:
        _fail(stopping.STOPPED, stopping.LINES[stopping.STOPPED])
    except KeyboardInterrupt:
        _fail(stopping.INTERRUPTED, stopping.LINES[stopping.INTERRUPTED])
    except Exception as error:
        out = getattr(arguments, "out", Path("."))
        if wrong := wrong_name(error):
            _fail(BAD_INPUT, f"error: {wrong}")
        if (said := full(error, out)) is None:
            if joining.joined():
                traceback.print_exc()
                stopping.leave(BROKE)
            raise
        files.drop_halves(out)
        _fail(BROKE, f"error: {said}; what was finished is saved")


def say_what_a_demo_is(model: str) -> None:
    """Says of the embedded models, and of no other, what may be expected of them."""
    if model in DEMOS:
        console.print(
            f"{model} {DEMOS[model]}\n--model Qwen/Qwen2.5-0.5B-Instruct (any hub id or directory) loads another one.\n"
        )


def progress(items: Iterable[ItemT], total: int, what: str, unit: str = "items") -> Iterator[ItemT]:
    """The items, with a bar that shows rate and time left; a signal ends it between two of them."""
    with bar(total, what, unit) as advance:
        for item in items:
            yield item
            advance(1)
            stopping.check()


@contextmanager
def bar(total: int | None, what: str, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar; yields `advance(n, note="")`. In it a signal waits for `stopping.check`. No total: time unknown."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(f"{unit} · {{task.fields[rate]}}{{task.fields[note]}}"),
        rich.progress.TimeRemainingColumn(),
    )
    here = console.is_jupyter  # where rich's own bar needs ipywidgets, and shows nothing without
    with stopping.held(), rich.progress.Progress(*columns, console=console, disable=here) as shown:
        task = shown.add_task(what, total=total, rate="", note="")
        line = _Line(shown) if here else None

        def advance(n: int, note: str = "") -> None:
            shown.update(task, advance=n)
            speed = shown.tasks[0].finished_speed or shown.tasks[0].speed
            rate = "" if not speed else f"{speed:.1f}/s " if speed >= 1 else f"{1 / speed:.1f} s each "
            shown.update(task, rate=rate, note=escape(note))
            if line is not None:
                line.show()

        try:
            yield advance
        finally:
            if line is not None:
                line.show(last=True)


class _Line:
    """A bar in a notebook: one output of its cell, written over."""

    def __init__(self, progress: rich.progress.Progress):
        self.progress, self.shown, self.handle = progress, -math.inf, None
        self.show()

    def show(self, last: bool = False) -> None:
        from IPython.display import display  # a notebook has it

        if (now := time.monotonic()) - self.shown < _PAUSE and not last:
            return
        self.shown = now
        drawn = Console(file=io.StringIO(), width=120, force_jupyter=False, color_system=None)
        with drawn.capture() as text:
            drawn.print(self.progress.get_renderable())
        said = {"text/plain": text.get().strip()}
        if self.handle is None:
            self.handle = display(said, raw=True, display_id=True)
        else:
            self.handle.update(said, raw=True)


def check_platform() -> None:
    """Raises, with what was asked for, where JAX finds no such device."""
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "the default")
        raise InputError(f"JAX_PLATFORMS={asked}: no such device here: {str(error).splitlines()[0]}") from None


def _keep_compilations() -> None:
    """Compiled programs outlive the process; JAX_COMPILATION_CACHE_DIR says where, else the user's cache directory."""
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # speed alone
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "qwen-eqx" / "xla"))


def _fail(code: int, message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    # the interpreter's own end would wait for the others, who wait for this one
    if joining.joined() or (stopping.installed() and code in stopping.LINES):
        stopping.leave(code)
    sys.exit(code)
