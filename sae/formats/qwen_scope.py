"""Qwen-Scope's `layerN.sae.pt`: read."""

import re
from pathlib import Path
from typing import Any

from sae.errors import InputError
from sae.formats import torchzip
from sae.formats.description import Description


def read_qwen_scope(path: Path, k: int | None) -> Description:
    """Qwen-Scope's `layerN.sae.pt`: W_enc [d_sae, d_model], W_dec [d_model, d_sae], TopK on the bare input.

    The published formula has no ReLU; a negative value among the k largest, which it would keep, is zero here.
    """
    if k is None:
        named = re.search(r"L0_(\d+)", str(path))
        if named is None:
            raise InputError(f"{path}: k: found none, expected L0_<k> in the path (as in its repository's name) or k=")
        k = int(named[1])
    stored = torchzip.read(path)
    tensors = {name: tensor.T if name in {"W_enc", "W_dec"} else tensor for name, tensor in stored.items()}
    metadata: dict[str, Any] = {"source_format": "qwen_scope"}
    if layer := re.search(r"layer(\d+)", path.name):
        metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    return Description("topk", tensors, apply_b_dec_to_input=False, details={"k": k}, metadata=metadata)
