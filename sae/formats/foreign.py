"""SAEs in other teams' words: a reader turns files into one description in SAELens' names, `build` makes the module.

Names and orientation: W_enc [d_model, d_sae], W_dec [d_sae, d_out], b_enc, b_dec, threshold, b_gate, b_mag, r_mag.
"""

import dataclasses
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sae import files
from sae.errors import InputError
from sae.formats import torchzip
from sae.forms.models import FORMS, AbstractSAE

NEEDED = {
    "relu": {"b_enc"},
    "topk": {"b_enc"},
    "batchtopk": {"b_enc", "threshold"},
    "matryoshka": {"b_enc", "threshold"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
}


@dataclasses.dataclass(frozen=True)
class Description:
    """What an SAE is, whoever wrote it."""

    form: str  # a key of FORMS
    tensors: Mapping[str, np.ndarray]  # SAELens' names and orientation
    apply_b_dec_to_input: bool
    k: Any = None  # k and widths as found: build checks them
    widths: Any = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build(where: Path, description: Description) -> AbstractSAE:
    """The module of a description, every tensor checked first; all that is wrong is listed in one InputError."""
    tensors, form = description.tensors, description.form
    needed = {"W_enc", "W_dec", "b_dec"} | NEEDED[form]
    problems = [f"{name}: missing" for name in sorted(needed - tensors.keys())]
    problems += [f"{name}: unexpected in the form {form}" for name in sorted(tensors.keys() - needed)]
    problems += [
        f"{name}: found {tensor.dtype.name}, expected floating point"
        for name, tensor in tensors.items()
        if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]
    if not problems:
        problems = _shape_problems(tensors, scalar_threshold=form in {"batchtopk", "matryoshka"})
        problems += [f"{name}: found NaN or infinity" for name, each in tensors.items() if not np.isfinite(each).all()]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")
    arrays = {name: jnp.asarray(np.asarray(tensor, np.float32)) for name, tensor in tensors.items()}
    fields: dict[str, Any] = {"encoder": arrays.pop("W_enc").T, "decoder": arrays.pop("W_dec"), **arrays}
    if form == "gated":
        fields["b_enc"] = fields.pop("b_gate")
    if form in {"topk", "batchtopk", "matryoshka"}:
        fields["k"] = _checked_k(where, description.k, fields["encoder"].shape[0])
    if form == "matryoshka":
        fields["widths"] = _checked_widths(where, description.widths, fields["encoder"].shape[0])
    return FORMS[form](**fields, apply_b_dec_to_input=description.apply_b_dec_to_input)


def _shape_problems(tensors: Mapping[str, np.ndarray], scalar_threshold: bool) -> list[str]:
    w_enc, w_dec = tensors["W_enc"], tensors["W_dec"]
    if w_enc.ndim != 2 or w_dec.ndim != 2 or 0 in w_enc.shape + w_dec.shape:
        return [f"W_enc, W_dec: found shapes {w_enc.shape} and {w_dec.shape}, expected two matrices"]
    (_, d_sae), d_out = w_enc.shape, w_dec.shape[1]
    expected = dict.fromkeys(tensors, (d_sae,)) | {"W_enc": w_enc.shape, "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if scalar_threshold:
        expected["threshold"] = ()
    return [
        f"{name}: found shape {tensor.shape}, expected {expected[name]}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]


def _checked_k(where: Path, k: Any, d_sae: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= d_sae:
        raise InputError(f"{where}: k: found {k!r}, expected a whole number from 1 to d_sae={d_sae}")
    return k


def _checked_widths(where: Path, widths: Any, d_sae: int) -> tuple[int, ...]:
    given = [width for width in widths if type(width) is int] if isinstance(widths, list | tuple) else []
    if not given or len(given) != len(widths) or given != sorted({*given, d_sae}) or given[0] < 1:
        raise InputError(f"{where}: widths: found {widths!r}, expected rising sizes that end at d_sae={d_sae}")
    return tuple(given)


def fold_decoder_norms(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same map with unit decoder rows: ‖W_dec_j‖ moves into the encoder, so latents are in units of the output."""
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    norms = np.maximum(np.linalg.norm(tensors["W_dec"], axis=-1), np.float32(1e-8))
    scaled = {name: tensors[name] * norms for name in ("W_enc", "b_enc") if name in tensors}
    return {**tensors, **scaled, "W_dec": tensors["W_dec"] / norms[:, None]}


def read_sparsify(directory: Path) -> Description:
    """EleutherAI's sparsify: `cfg.json` and `sae.safetensors` (sparsify/sparse_coder.py); TopK of ReLU'd values."""
    path = directory / "cfg.json"
    config = files.read_json(path)
    for field, accepted in {
        "activation": "topk", "skip_connection": False, "embed_skip": False, "gram_lookup": False, "signed": False,
    }.items():  # fmt: skip
        if config.get(field, accepted) != accepted:
            raise InputError(f"{path}: {field}: found {config[field]!r}, expected {accepted!r}, as implemented")
    stored = files.map_tensors(directory / "sae.safetensors")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    tensors = {names.get(name, name): tensor for name, tensor in stored.items()}
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T  # a torch Linear: [d_sae, d_model]
    metadata: dict[str, Any] = {"source_format": "sparsify", "hookpoint": directory.name}
    if layer := re.fullmatch(r"layers\.(\d+)", directory.name):
        metadata["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    return Description("topk", tensors, not config.get("transcode", False), config.get("k"), metadata=metadata)


def read_dictionary_learning(path: Path) -> Description:
    """`ae.pt` and, beside it, `config.json` of dictionary_learning (dictionary.py, trainers/); parameters as stored."""
    stored = torchzip.read(path)
    config_path = path.parent / "config.json"
    trainer = files.read_json(config_path).get("trainer", {}) if config_path.exists() else {}
    kind = trainer.get("dict_class") or _guess_class(path, stored)
    if kind not in _DICTIONARIES:
        raise InputError(f"{config_path}: dict_class: found {kind!r}, expected one of {', '.join(_DICTIONARIES)}")
    form, subtracts = _DICTIONARIES[kind]
    tensors = {}
    for name, tensor in stored.items():
        if name not in {"k", "group_sizes", "threshold"}:
            tensors[_DICTIONARY_NAMES.get(name, name)] = tensor.T if name in _LINEAR else tensor
        elif name == "threshold" and form in {"jumprelu", "batchtopk", "matryoshka"}:
            tensors["threshold"] = tensor  # a TopK dictionary stores one too and does not use it
    k = int(stored["k"]) if "k" in stored else trainer.get("k")
    widths = tuple(int(width) for width in np.cumsum(stored["group_sizes"])) if "group_sizes" in stored else None
    metadata = {"source_format": "dictionary_learning", "dict_class": kind, "model_name": trainer.get("lm_name")}
    if isinstance(trainer.get("layer"), int) and "resid_post" in str(trainer.get("submodule_name", "resid_post")):
        metadata["hook_name"] = f"blocks.{trainer['layer']}.hook_resid_post"
    return Description(form, tensors, subtracts, k, widths, metadata)


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
    return Description("topk", tensors, apply_b_dec_to_input=False, k=k, metadata=metadata)


READERS: dict[str, Callable[[Path], Description]] = {  # the file that gives a directory away -> its reader
    "sae.safetensors": lambda directory: read_sparsify(directory),
    "ae.pt": lambda directory: read_dictionary_learning(directory / "ae.pt"),
    "params.npz": lambda directory: read_gemma_scope(directory / "params.npz"),
    "params.safetensors": lambda directory: read_gemma_scope(directory / "params.safetensors"),
}
