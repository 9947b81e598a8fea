"""A stop that saves first: what SIGTERM raises, and handlers that are put back."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):  # as KeyboardInterrupt: the signal may arrive inside a call that catches every Exception
    """Asked to stop (SIGTERM); what was finished is saved."""


@contextmanager
def on_sigterm(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGTERM calls `handle` inside the with block; outside the main thread, where Python takes no handlers, it does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(number: int, frame: FrameType | None) -> None:
    """Raises at once, wherever the program stands."""
    raise Stopped
