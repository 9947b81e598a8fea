"""Commands run at their edge in this process: flags in, exit code and what stands on stderr out."""

import importlib
import io
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import jax

from qwen_lab import cli


def at_edge(command: str, *flags: str) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    module = importlib.import_module(command)
    config = next(getattr(module, name) for name in ("Config", "RunConfig", "LMConfig") if hasattr(module, name))
    with (
        mock.patch.object(sys, "argv", [f"{command}.py", *flags]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()) as said,
    ):
        try:
            cli.run(module.main, config)
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()
    return 0, said.getvalue()


def refused(command: str, *flags: str) -> str:
    """The one line with which a command ends at wrong input."""
    code, said = at_edge(command, *flags)
    assert code == 2, (code, said)
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    return said


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes: what is written then fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # no program is kept in part
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def entries(directory: Path) -> set[str]:
    """Everything below a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
