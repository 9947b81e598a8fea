"""EleutherAI's sparsify: read."""

import re
from pathlib import Path
from typing import Any

from sae import files
from sae.errors import InputError
from sae.formats.description import Description


def read_sparsify(directory: Path) -> Description:
    """EleutherAI's sparsify: `cfg.json` and `sae.safetensors` (sparsify/sparse_coder.py); TopK of ReLU'd values."""
    path = directory / "cfg.json"
    config = files.read_json(path)
    for field, accepted in {
        "activation": "topk", "skip_connection": False, "embed_skip": False, "gram_lookup": False, "signed": False,
    }.items():  # fmt: skip
        if config.get(field, accepted) != accepted:
            raise InputError(f"{path}: {field}: found {config[field]!r:.80}, expected {accepted!r}, as implemented")
    stored = files.map_tensors(directory / "sae.safetensors")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    tensors = {names.get(name, name): tensor for name, tensor in stored.items()}
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T  # a torch Linear: [d_sae, d_model]
    metadata: dict[str, Any] = {"source_format": "sparsify", "hookpoint": directory.name}
    if layer := re.fullmatch(r"layers\.(\d+)", directory.name):
        metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    subtracts = not files.typed(path, config, "transcode", bool, False)
    return Description("topk", tensors, subtracts, {"k": config.get("k")}, metadata)
