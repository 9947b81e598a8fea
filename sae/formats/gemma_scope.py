"""Gemma Scope's parameters: read."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from sae import files
from sae.errors import InputError
from sae.formats.description import Description


def read_gemma_scope(path: Path) -> Description:
    """Gemma Scope's `params.npz`, Gemma Scope 2's `params.safetensors`: bare-input JumpReLU (arXiv 2408.05147)."""
    stored = files.map_tensors(path) if path.suffix == ".safetensors" else _read_npz(path)
    tensors = {re.sub("^w_", "W_", name): tensor for name, tensor in stored.items()}
    metadata: dict[str, Any] = {"source_format": "gemma_scope"}
    layer = re.search(r"layer_(\d+)", str(path))
    if layer and re.search(r"-res(/|-|$)|resid_post", str(path.parent)):
        metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    return Description("jumprelu", tensors, apply_b_dec_to_input=False, metadata=metadata)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}, expected an npz of plain arrays") from None
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path}: found no npz of plain arrays ({error}), expected Gemma Scope's parameters") from None
