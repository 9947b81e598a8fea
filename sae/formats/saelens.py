"""SAELens' directory, version 6: our native format, read and written.

SAELens knows no BatchTopK or Matryoshka at inference: both are written as it writes them, a `jumprelu` whose thresholds
are all equal, with the form they were trained in under `metadata.training_architecture`; loading restores that form.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from sae import files
from sae.errors import InputError
from sae.formats.foreign import Description, build, fold_decoder_norms
from sae.forms.models import FORMS, AbstractSAE, Gated

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SAE_LENS_VERSION = "6.54.12"  # whose format this is; below 6.0.0 SAELens takes cfg.json for a legacy one
TRAINED_AS = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}  # ours -> SAELens' training architecture
ARCHITECTURES = {  # form -> SAELens' name as an autoencoder, and as a transcoder (it has no TopK or gated transcoder)
    "relu": ("standard", "transcoder"),
    "topk": ("topk", "topk_transcoder"),
    "batchtopk": ("jumprelu", "jumprelu_transcoder"),
    "matryoshka": ("jumprelu", "jumprelu_transcoder"),
    "jumprelu": ("jumprelu", "jumprelu_transcoder"),
    "gated": ("gated", "gated_transcoder"),
}
_FORM_OF = {
    **{name: form for form, names in reversed(ARCHITECTURES.items()) for name in names},
    "jumprelu": "jumprelu",
    "jumprelu_transcoder": "jumprelu",
    **{theirs: ours for ours, theirs in TRAINED_AS.items()},  # training checkpoints
}
_STRUCTURE = {"architecture", "d_in", "d_sae", "d_out", "dtype", "device", "k", "apply_b_dec_to_input", "metadata"}


def save(
    module: AbstractSAE,
    directory: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    density: Float[np.ndarray | jax.Array, " d_sae"] | None = None,
) -> None:
    """Write a SAELens v6 directory; `metadata` is JSON (SAELens and its tools know model_name, hook_name, …)."""
    directory = Path(directory)
    form = next((name for name, kind in FORMS.items() if type(module) is kind), None)
    if form is None:
        raise InputError(f"module: found {type(module).__name__}, expected one of {', '.join(FORMS)}")
    tensors = _tensors(module)
    build(Path("module"), _description(module, form, tensors))  # what could not be loaded is not saved
    weights = safetensors.numpy.save(_exported(tensors, form))
    config = files.dump_json(_config(module, form, dict(metadata or {})) | {"weights_digest": files.digest(weights)})
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: found a file, expected a directory")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SPARSITY).unlink(missing_ok=True)  # of what was saved here before
    if density is not None:
        sparsity = np.log10(np.asarray(density, np.float32) + np.float32(1e-10))  # SAELens' definition
        files.commit(directory / SPARSITY, safetensors.numpy.save({"sparsity": sparsity}))
    files.commit(directory / WEIGHTS, weights)
    files.commit(directory / CONFIG, config)  # last: its digest tells a half-written directory from a whole one


def read_saelens(directory: Path) -> Description:
    """A SAELens directory, of version 6 or before (sae_lens/saes/sae.py, loading/pretrained_sae_loaders.py)."""
    path = directory / CONFIG
    config = _modernized(path, files.read_json(path))
    architecture = config.get("architecture", "standard")
    if architecture not in _FORM_OF:
        raise InputError(f"{path}: architecture: found {architecture!r}, expected one of {', '.join(sorted(_FORM_OF))}")
    weights = directory / WEIGHTS
    if config.get("weights_digest", "none") not in {"none", files.digest_file(weights)}:
        raise InputError(f"{weights}: digest: found other bytes than were saved, expected those of {CONFIG}")
    tensors = _known_tensors(weights)
    form, rescaled = _FORM_OF[architecture], config.get("rescale_acts_by_decoder_norm", False)
    if rescaled and form in {"topk", "batchtopk", "matryoshka"}:
        tensors = fold_decoder_norms(tensors)
    for field, name, axis in (("d_in", "W_enc", 0), ("d_sae", "W_enc", 1), ("d_out", "W_dec", 1)):
        found = tensors[name].shape[axis] if name in tensors and tensors[name].ndim == 2 else config.get(field)
        if config.get(field, found) != found:
            raise InputError(f"{path}: {field}: found {config[field]}, expected {found} as {WEIGHTS} has it")
    k, widths = config.get("k"), config.get("matryoshka_widths")
    metadata = dict(config["metadata"])
    if form == "jumprelu":
        form, tensors, k, widths = _as_trained(form, tensors, metadata)
    d_sae = config.get("d_sae", 0)
    if form == "matryoshka" and isinstance(widths, list) and widths[-1:] != [d_sae]:
        widths = [*widths, d_sae]  # SAELens trains on the whole too, whether or not it is listed
    subtracts = bool(config.get("apply_b_dec_to_input", True))
    return Description(form, tensors, subtracts, k if _whole(k) is None else _whole(k), widths, metadata)


def _as_trained(form: str, tensors: dict[str, np.ndarray], metadata: dict[str, Any]):
    """The form a jumprelu was trained in, if the metadata name one and every threshold is still the same."""
    trained = {theirs: ours for ours, theirs in TRAINED_AS.items()}.get(str(metadata.get("training_architecture")))
    details = metadata.get("training_architecture_details")
    threshold = tensors.get("threshold", np.empty(0))
    one = threshold.ndim == 1 and len(threshold) > 0 and bool((threshold == threshold[0]).all())
    if trained is None or not one or not isinstance(details, dict) or _whole(details.get("k")) is None:
        return form, tensors, None, None
    return trained, {**tensors, "threshold": threshold[0, ...]}, details["k"], details.get("matryoshka_widths")


def _whole(k: Any) -> int | None:
    """SAELens spells BatchTopK's k as a float, and it may be a fraction."""
    return int(k) if isinstance(k, int | float) and float(k).is_integer() else None


def _modernized(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config in version 6's words; whatever changes the numbers and is not implemented is refused by name."""
    metadata = config.get("metadata")
    if not isinstance(metadata, dict) or int(str(metadata.get("sae_lens_version", "0")).split(".")[0]) < 6:
        activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
        details = config.get("activation_fn_kwargs") or {}
        if activation not in {"relu", "topk"}:
            raise InputError(f"{path}: activation_fn: found {activation!r}, expected relu or topk")
        metadata = {name: value for name, value in config.items() if name not in _STRUCTURE}
        config = {**config, "metadata": metadata}
        if "hook_point" in metadata:
            metadata.setdefault("hook_name", metadata["hook_point"])
        if activation == "topk":
            config |= {"architecture": "topk", "k": details.get("k")}
    for field, accepted in {
        "normalize_activations": ("none", None, False),
        "finetuning_scaling_factor": (False, None),
        "reshape_activations": ("none", "hook_z", None),  # hook_z only says how heads were laid side by side
    }.items():
        if config.get(field) not in accepted:
            raise InputError(
                f"{path}: {field}: found {config[field]!r}, expected {accepted[0]!r}, which is implemented"
            )
    return config


def _known_tensors(weights: Path) -> dict[str, np.ndarray]:
    """A SAELens state dict in version 6's words."""
    tensors = files.map_tensors(weights)
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors.pop("topk_threshold").reshape(())
    if "log_threshold" in tensors:
        tensors["threshold"] = np.exp(np.asarray(tensors.pop("log_threshold"), np.float32))
    if (factor := tensors.pop("scaling_factor", None)) is not None and not np.allclose(factor, 1):
        raise InputError(f"{weights}: scaling_factor: found values other than 1, expected none: it is not implemented")
    return tensors


def _tensors(module: AbstractSAE) -> dict[str, np.ndarray]:
    """A module's parameters in SAELens' names and orientation."""
    if module.encoder.ndim != 2:
        raise InputError(
            f"module: encoder: found shape {module.encoder.shape}, expected one SAE: index the sweep first"
        )
    tensors = {name: np.asarray(getattr(module, name)) for name in ("W_enc", "W_dec", "b_dec", *module.in_latent_units)}
    if isinstance(module, Gated):
        tensors |= {"b_gate": tensors.pop("b_enc"), "r_mag": np.asarray(module.r_mag)}
    return tensors


def _description(module: AbstractSAE, form: str, tensors: Mapping[str, np.ndarray]) -> Description:
    k, widths = getattr(module, "k", None), getattr(module, "widths", None)
    return Description(form, tensors, module.apply_b_dec_to_input, k, widths)


def _exported(tensors: Mapping[str, np.ndarray], form: str) -> dict[str, np.ndarray]:
    """What SAELens reads: one threshold per latent."""
    exported = dict(tensors)
    if form in TRAINED_AS:
        exported["threshold"] = np.full(tensors["b_enc"].shape, tensors["threshold"])
    return {name: np.ascontiguousarray(tensor) for name, tensor in exported.items()}  # else wrong bytes are written


def _config(module: AbstractSAE, form: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """SAELens' cfg.json."""
    transcodes = module.d_out != module.d_model or "hook_name_out" in metadata
    stale = {"training_architecture", "training_architecture_details"}  # of a form this SAE may have been loaded as
    metadata = {name: value for name, value in metadata.items() if name not in stale}
    details = {"k": getattr(module, "k", None), "matryoshka_widths": list(getattr(module, "widths", ()))}
    if form in TRAINED_AS:
        metadata |= {"training_architecture": TRAINED_AS[form], "training_architecture_details": details}
    config = {
        "architecture": ARCHITECTURES[form][transcodes],
        "d_in": module.d_model,
        "d_sae": module.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": module.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_training_version": None, **metadata, "sae_lens_version": SAE_LENS_VERSION},
    }
    if transcodes:
        config["d_out"] = module.d_out
    if form == "topk":
        config |= {"k": details["k"], "rescale_acts_by_decoder_norm": False}
    return config


def read_density(path: Path, d_sae: int) -> np.ndarray | None:
    """The fraction of tokens on which each latent fired, if the directory says so."""
    if not (path / SPARSITY).is_file():
        return None
    stored = files.map_tensors(path / SPARSITY)
    expected = (d_sae,)
    if stored.keys() != {"sparsity"} or stored["sparsity"].shape != expected:
        raise InputError(f"{path / SPARSITY}: found {sorted(stored)}, expected one tensor sparsity of shape {expected}")
    return np.maximum(10.0 ** np.asarray(stored["sparsity"], np.float32) - np.float32(1e-10), np.float32(0))
