"""How puzzles are put to a model and which it can do: as flags say, as a dictionary was trained, as the model itself says.

A model directory says it in tokenizer_config.json, `"arc": {"encoder": …, "prompt": …, "tasks": …}`.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import arc
import qwen_eqx
from qwen_eqx.text.tokenizer import SETTINGS
from qwen_lab.errors import InputError

MODEL = os.environ.get("QWEN_LAB_MODEL", "tiny-arc")  # of every command that is told none
AUTO = "auto"  # a flag that was not given
KEY = "arc"
USUAL = {"tasks": "arc-agi-1/training", "encoder": arc.DEFAULT_ENCODER, "prompt": arc.DEFAULT_PROMPT}
ConfigT = TypeVar("ConfigT")


def of_model(tokenizer: qwen_eqx.Tokenizer) -> dict[str, str]:
    """What a model's directory says of the puzzles it was trained on; empty where it says nothing."""
    settings = json.loads(tokenizer.files.get(SETTINGS, b"{}"))
    said = settings.get(KEY, {})
    if not isinstance(said, dict) or not all(isinstance(said.get(name, ""), str) for name in USUAL):
        raise InputError(f"{tokenizer.where}/{SETTINGS}: {KEY}: found {said!r:.80}, expected an object of names")
    return {name: said[name] for name in USUAL if name in said}


def saying(tokenizer: qwen_eqx.Tokenizer, **said: str) -> qwen_eqx.Tokenizer:
    """The tokenizer whose directory will say this."""
    settings = json.loads(tokenizer.files.get(SETTINGS, b"{}"))
    data = json.dumps(settings | {KEY: said}, indent=2) + "\n"
    return dataclasses.replace(tokenizer, files={**tokenizer.files, SETTINGS: data.encode()})


def filled(config: ConfigT, tokenizer: qwen_eqx.Tokenizer, metadata: Mapping[str, Any] | None = None) -> ConfigT:
    """The config with what is `auto` in its fields tasks, encoder and prompt replaced by names."""
    known = USUAL | of_model(tokenizer)
    known |= {name: value for name, value in (metadata or {}).items() if name in known and isinstance(value, str)}
    asked = {name: known[name] for name in USUAL if getattr(config, name, None) == AUTO}
    filled = dataclasses.replace(config, **asked)  # pyright: ignore[reportArgumentType, reportCallIssue]
    arc.encode.as_encoder(filled.encoder)  # a wrong name raises here, not as a prompt that does not fit
    arc.prompt.as_format(filled.prompt)
    return filled
