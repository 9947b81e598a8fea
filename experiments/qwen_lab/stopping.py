"""Signals that end a run: a flag that its loops read, handlers that are in place before anything heavy is imported.

A command calls `install` before its imports. Until something is `held`, Ctrl-C and SIGTERM end the process at once, for
nothing would be lost; inside `held` they wait for the next `check`, and a second one ends it at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar, NoReturn

STOPPED, INTERRUPTED = 75, 130
LINES = {
    STOPPED: "stopped: what was finished is saved; run the same command again to go on",
    INTERRUPTED: "interrupted: what was finished is saved; run the same command again to go on",
}
CODES = {signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}


class Stopped(BaseException):  # as KeyboardInterrupt: the signal may arrive inside a call that catches every Exception
    """Asked to stop (SIGTERM); what was finished is saved."""


class _State:
    """Of this process, as signals are."""

    installed = False
    holders = 0
    asked: int | None = None
    failed: BaseException | None = None
    grace: float | None = None  # seconds from a signal to the end, whoever looks for it
    counts: ClassVar = [0, 0]  # signals seen by the handler and by the thread that watches
    lock = threading.RLock()  # a handler may interrupt a handler


def install() -> None:
    """Takes both signals for the rest of this process; only a command's own process is taken."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in CODES:
        signal.signal(number, _pass)
    # C code writes the signal's number at once: neither a compilation nor a callback of XLA's can swallow or delay it
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _State.installed = True
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def installed() -> bool:
    return _State.installed


@contextmanager
def held() -> Iterator[None]:
    """Inside the with block a signal waits for `check`; one that nobody looked for is raised at its end."""
    before = {}
    if not _State.holders:
        _State.asked = _State.failed = None
        if (
            not _State.installed and threading.current_thread() is threading.main_thread()
        ):  # Python handles it only there
            before = {number: signal.signal(number, _take) for number in CODES}
    _State.holders += 1
    try:
        yield
    finally:
        _State.holders -= 1
        for number, handler in before.items():
            signal.signal(number, handler)
    check()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Inside the with block a signal ends a command after so long, also where no `check` comes: all files are whole."""
    _State.grace = seconds
    try:
        yield
    finally:
        _State.grace = None


def asked() -> bool:
    """Whether a signal or a failure waits for `check`."""
    return _State.asked is not None or _State.failed is not None


def fail(error: BaseException) -> None:
    """Ends what the main thread does at its next `check`: for a thread that finds a reason."""
    _State.failed = error


def check() -> None:
    """Raises what waits: Stopped after SIGTERM, KeyboardInterrupt after Ctrl-C, or why a thread had to fail."""
    number, _State.asked = _State.asked, None
    error, _State.failed = _State.failed, None
    if number is not None:
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped
    if error is not None:
        raise error


def leave(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end, in which threads of XLA's may still run and crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _pass(number: int, frame: FrameType | None) -> None:
    """Between two lines of Python: the next one knows of the signal already."""
    _note(number, 0)


def _take(number: int, frame: FrameType | None) -> None:
    if _State.asked is not None:
        check()
    _State.asked = number


def _watch(reading: int) -> None:
    """Also while the main thread is inside a call of C that takes minutes."""
    while True:
        for number in os.read(reading, 16):
            if number in CODES:
                _note(number, 1)


def _note(number: int, who: int) -> None:
    with _State.lock:
        _State.counts[who] += 1
        if _State.counts[who] <= _State.counts[1 - who]:
            return  # the other one was first
        if not _State.holders or _State.asked is not None:
            _end(CODES[signal.Signals(number)])
        _State.asked = number
        if _State.grace is not None:
            timer = threading.Timer(_State.grace, _end, [CODES[signal.Signals(number)]])
            timer.daemon = True
            timer.start()


def _end(code: int) -> NoReturn:
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os.write(2, f"{LINES[code]}\n".encode())
    os._exit(code)
