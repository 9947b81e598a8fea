"""The process keeps the memory of finished steps: on CPU, giving it back and fetching it again takes a quarter of a step."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h
ENVIRONMENT = {  # the same for another program
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26), "MALLOC_ARENA_MAX": "1",
}  # fmt: skip


_ours = False  # the memory of a process that only imports this is not ours to arrange


def begin() -> None:
    """Before JAX starts its threads: they will take memory from the main thread's heap, the one that can grow at will."""
    global _ours
    _ours = True
    _set((_M_ARENA_MAX, 1))


def keep() -> None:
    """After `begin`, once weights are loaded: every request is answered from that heap, and it never shrinks.

    XLA asks anew for its buffers at every call. By default glibc maps each from the system and unmaps it again, and
    every page is cleared by the kernel when it is first touched (mallopt(3)). Weights are read faster from memory that
    was mapped, so they come before. Without `begin`, or without glibc, nothing changes.
    """
    if _ours:
        _set((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**26))


def _set(*settings: tuple[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for parameter, value in settings:
        mallopt(parameter, value)
