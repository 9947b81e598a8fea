"""dictionary_learning's `ae.pt`: read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae import files
from sae.errors import InputError
from sae.formats import torchzip
from sae.formats.description import Description, stored_names
from sae.forms import FORMS


def read_dictionary_learning(path: Path) -> Description:
    """`ae.pt` and, beside it, `config.json` of dictionary_learning (dictionary.py, trainers/); parameters as stored."""
    stored = torchzip.read(path)
    config_path = path.parent / "config.json"
    config = files.read_json(config_path) if config_path.exists() else {}
    trainer = files.typed(config_path, config, "trainer", dict, {})
    kind = trainer.get("dict_class") or _guess_class(path, stored)
    if not isinstance(kind, str) or kind not in _DICTIONARIES:
        raise InputError(f"{config_path}: dict_class: found {kind!r:.80}, expected one of {', '.join(_DICTIONARIES)}")
    form, subtracts = _DICTIONARIES[kind]
    tensors = {}
    for name, tensor in stored.items():
        if name not in {"k", "group_sizes", "threshold"}:
            tensors[_DICTIONARY_NAMES.get(name, name)] = tensor.T if name in _LINEAR else tensor
        elif name == "threshold" and "threshold" in stored_names(FORMS[form]):
            tensors["threshold"] = tensor  # a TopK dictionary stores one too and does not use it
    k = _whole(path, "k", stored["k"], 0).item() if "k" in stored else trainer.get("k")
    widths = None
    if "group_sizes" in stored:
        widths = tuple(np.cumsum(_whole(path, "group_sizes", stored["group_sizes"], 1)).tolist())
    metadata = {"source_format": "dictionary_learning", "dict_class": kind, "model_name": trainer.get("lm_name")}
    if isinstance(trainer.get("layer"), int) and "resid_post" in str(trainer.get("submodule_name", "resid_post")):
        metadata["hook_name"] = f"blocks.{trainer['layer']}.hook_resid_post"
    return Description(form, tensors, subtracts, {"k": k, "widths": widths}, metadata)


def _whole(path: Path, name: str, tensor: np.ndarray, axes: int) -> np.ndarray:
    """Whole numbers, in a tensor of so many axes."""
    if tensor.dtype.kind not in "iu" or tensor.ndim != axes:
        raise InputError(
            f"{path}: {name}: found {tensor.dtype} {list(tensor.shape)}, expected whole numbers in {axes} axes"
        )
    return tensor


def _guess_class(path: Path, stored: Mapping[str, Any]) -> str:
    """The class whose state dict has these names, where only one has."""
    if {"k", "threshold"} <= stored.keys() and "group_sizes" not in stored:
        raise InputError(f"{path.parent}: found no config.json, expected it to tell AutoEncoderTopK from BatchTopKSAE")
    marks = {
        "group_sizes": "MatryoshkaBatchTopKSAE", "k": "AutoEncoderTopK", "gate_bias": "GatedAutoEncoder",
        "threshold": "JumpReluAutoEncoder", "decoder.bias": "AutoEncoderNew", "bias": "AutoEncoder",
    }  # fmt: skip
    return next((kind for mark, kind in marks.items() if mark in stored), "unknown")


_LINEAR = {"encoder.weight", "decoder.weight"}  # torch Linears: [out, in]
_DICTIONARY_NAMES = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec",
    "decoder.bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
_DICTIONARIES: dict[str, tuple[str, bool]] = {  # class -> form, whether b_dec is subtracted from the input
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batchtopk", True),
    "MatryoshkaBatchTopKSAE": ("matryoshka", True),
}
