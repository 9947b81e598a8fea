"""Where the packages meet: what commands, scripts and notebooks share."""

import ast
import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_lab.completions import generate as generate
    from qwen_lab.completions import outcome as outcome
    from qwen_lab.completions import read as read
    from qwen_lab.completions import tokens_of as tokens_of
    from qwen_lab.corpus import Document as Document
    from qwen_lab.corpus import cells_of_tokens as cells_of_tokens
    from qwen_lab.corpus import documents as documents
    from qwen_lab.errors import InputError as InputError
    from qwen_lab.errors import RunError as RunError
    from qwen_lab.evaluation import Data as Data
    from qwen_lab.evaluation import evaluate as evaluate
    from qwen_lab.jobs import open_job as open_job
    from qwen_lab.jobs import train as train
    from qwen_lab.loading import load_dictionary as load_dictionary
    from qwen_lab.pages import Detail as Detail
    from qwen_lab.pages import write_gallery as write_gallery
    from qwen_lab.places import Dictionary as Dictionary
    from qwen_lab.places import Place as Place
    from qwen_lab.prompts import Item as Item
    from qwen_lab.prompts import asking as asking
    from qwen_lab.prompts import items as items
    from qwen_lab.runs import Result as Result
    from qwen_lab.runs import Run as Run
    from qwen_lab.settings import RunConfig as RunConfig
    from qwen_lab.sources import Forward as Forward
    from qwen_lab.sources import Live as Live
    from qwen_lab.sources import Stored as Stored
    from qwen_lab.stopping import Stopped as Stopped
    from qwen_lab.sweeps import Member as Member

# A name is imported when it is asked for: a command's handlers of signals stand before JAX is imported. So the imports
# above are read here, by type checkers and by the reference, and never run.
_HOMES = {
    alias.name: node.module
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[__name__])))
    if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("qwen_lab.")
    for alias in node.names
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
