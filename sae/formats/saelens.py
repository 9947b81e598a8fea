"""SAELens' directory, version 6: our native format, read and written.

SAELens knows no BatchTopK or Matryoshka at inference: both are written as it writes them, a `jumprelu` whose thresholds
are all equal, with the form they were trained in under `metadata.training_architecture`; loading restores that form.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from sae import files, storage
from sae.errors import InputError
from sae.formats.description import Description, build, describe, fold_decoder_norms
from sae.forms import FORMS
from sae.forms.abstract import AbstractDictionary

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SAE_LENS_VERSION = "6.54.12"  # whose format this is; below 6.0.0 SAELens takes cfg.json for a legacy one


class Row(NamedTuple):
    """What SAELens calls a form."""

    architecture: str
    transcoder: str | None = None
    trained_as: str | None = None  # written as a `jumprelu` of one threshold, with this training architecture
    opens: tuple[bool, bool] = (True, True)  # whether SAELens has the architecture, and the transcoder


ROWS = {
    "relu": Row("standard", "transcoder"),
    "topk": Row("topk", "topk_transcoder", opens=(True, False)),
    "batchtopk": Row("jumprelu", "jumprelu_transcoder", trained_as="batchtopk"),
    "matryoshka": Row("jumprelu", "jumprelu_transcoder", trained_as="matryoshka_batchtopk"),
    "jumprelu": Row("jumprelu", "jumprelu_transcoder"),
    "gated": Row("gated", "gated_transcoder", opens=(True, False)),
    "skip": Row("jumprelu_skip_transcoder", "jumprelu_skip_transcoder", trained_as="skip_batchtopk"),
    "crosscoder": Row("crosscoder", opens=(False, False)),  # ours: SAELens has none
    "clt": Row("clt", opens=(False, False)),  # ours too
}
_TRAINED_AS = {row.trained_as: form for form, row in ROWS.items() if row.trained_as}  # also of training checkpoints
_FORM_OF = _TRAINED_AS | {
    name: form
    for form, row in sorted(ROWS.items(), key=lambda item: not item[1].trained_as)
    for name in row[:2]
    if name is not None
}  # of two forms with one name the one that is not trained as another
_STRUCTURE = {"architecture", "d_in", "d_sae", "d_out", "dtype", "device", "k", "apply_b_dec_to_input", "metadata"}


def opens(form: str, transcoder: bool = False) -> bool:
    """Whether SAELens opens what `save` writes of this form."""
    return ROWS[form].opens[transcoder]


def save(
    module: AbstractDictionary,
    directory: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    density: Float[np.ndarray | jax.Array, " d_sae"] | None = None,
) -> None:
    """Write a SAELens v6 directory, at a path or URL; `metadata` is JSON (its tools know model_name, hook_name, …)."""
    home = storage.place(directory)
    if module.name not in ROWS or FORMS.get(module.name) is not type(module):
        raise InputError(f"module: found {type(module).__name__}, expected one of {', '.join(ROWS)}")
    if module.b_enc.ndim != 1:
        raise InputError(
            f"module: encoder: found shape {module.encoder.shape}, expected one SAE: index the sweep first"
        )
    if float(getattr(module, "threshold", jnp.zeros(())).min()) < 0:
        raise InputError(
            f"module: threshold: found none learned, expected one: train the {module.name}, or take "
            "`module.with_threshold(rows)`; without it other tools would compute other values"
        )
    described = describe(module)
    build(Path("module"), described)  # what could not be loaded is not saved
    weights = safetensors.numpy.save(_exported(described))
    config = files.dump_json(
        _config(module, described, dict(metadata or {})) | {"weights_digest": files.digest(weights)}
    )
    sparsity = None if density is None else _sparsity(density, module.d_sae)
    if home.size() is not None:
        raise InputError(f"{home}: found a file, expected a directory")
    (home / WEIGHTS).put(weights)  # first: where this fails, what was saved here before is whole
    if sparsity is None:
        (home / SPARSITY).remove()  # of what was saved here before
    else:
        (home / SPARSITY).put(sparsity)
    (home / CONFIG).put(config)  # last: its digest tells a half-written directory from a whole one


def _sparsity(density: Float[np.ndarray | jax.Array, " latents"], d_sae: int) -> bytes:
    if density.shape != (d_sae,):
        raise InputError(f"density: found shape {density.shape}, expected {(d_sae,)}")
    logarithm = np.log10(np.asarray(density, np.float32) + np.float32(1e-10))  # SAELens' definition
    return safetensors.numpy.save({"sparsity": logarithm})


def read_saelens(directory: Path) -> Description:
    """A SAELens directory, of version 6 or before (sae_lens/saes/sae.py, loading/pretrained_sae_loaders.py)."""
    path = directory / CONFIG
    config = _modernized(path, files.read_json(path))
    architecture = files.typed(path, config, "architecture", str, "standard")
    if architecture not in _FORM_OF:
        raise InputError(
            f"{path}: architecture: found {architecture!r:.80}, expected one of {', '.join(sorted(_FORM_OF))}"
        )
    weights = directory / WEIGHTS
    if files.typed(path, config, "weights_digest", str, "none") not in ("none", files.digest_file(weights)):
        raise InputError(f"{weights}: digest: found other bytes than were saved, expected those of {CONFIG}")
    tensors = _known_tensors(weights)
    form, rescaled = _FORM_OF[architecture], files.typed(path, config, "rescale_acts_by_decoder_norm", bool, False)
    if rescaled and FORMS[form].several_sites:
        raise InputError(f"{path}: rescale_acts_by_decoder_norm: found True, expected False for a {form}")
    if rescaled and "k" in FORMS[form].details:
        tensors = fold_decoder_norms(tensors)
    for field, name, axis in (("d_in", "W_enc", -2), ("d_sae", "W_enc", -1), ("d_out", "W_dec", -1)):
        found = tensors[name].shape[axis] if name in tensors and tensors[name].ndim >= 2 else config.get(field)
        if config.get(field, found) != found:
            raise InputError(f"{path}: {field}: found {config[field]!r:.80}, expected {found} as {WEIGHTS} has it")
    details = {"k": config.get("k"), "widths": config.get("matryoshka_widths")}
    metadata = dict(config["metadata"])
    if any(architecture in row[:2] for row in ROWS.values() if row.trained_as):
        form, tensors, details = _as_trained(form, tensors, metadata)
    widths, d_sae = details.get("widths"), config.get("d_sae", 0)
    if isinstance(widths, list) and widths[-1:] != [d_sae]:
        details["widths"] = [*widths, d_sae]  # SAELens trains on the whole too, whether or not it is listed
    whole = _whole(details.get("k"))
    details["k"] = details.get("k") if whole is None else whole
    subtracts = files.typed(path, config, "apply_b_dec_to_input", bool, True)
    return Description(form, tensors, subtracts, details, metadata)


def _as_trained(
    form: str, tensors: dict[str, np.ndarray], metadata: dict[str, Any]
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """The form a jumprelu was trained in, if the metadata name one and every threshold is still the same."""
    trained = _TRAINED_AS.get(str(metadata.get("training_architecture")))
    said = metadata.get("training_architecture_details")
    threshold = tensors.get("threshold", np.empty(0))
    one = threshold.ndim == 1 and len(threshold) > 0 and bool((threshold == threshold[0]).all())
    if trained is None or not one or not isinstance(said, dict) or _whole(said.get("k")) is None:
        return form, tensors, {}
    details = {"k": said["k"], "widths": said.get("matryoshka_widths")}
    return trained, {**tensors, "threshold": threshold[0, ...]}, details


def _whole(k: Any) -> int | None:
    """SAELens spells BatchTopK's k as a float, and it may be a fraction."""
    return int(k) if isinstance(k, int) or (isinstance(k, float) and k.is_integer()) else None


def _modernized(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config in version 6's words; whatever changes the numbers and is not implemented is refused by name."""
    metadata = config.get("metadata")
    if not isinstance(metadata, dict) or _major(path, metadata.get("sae_lens_version", "0")) < 6:
        activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
        said = {name: value for name, value in config.items() if value is not None}  # it wrote null for none
        details = files.typed(path, said, "activation_fn_kwargs", dict, {})
        if activation not in ("relu", "topk"):
            raise InputError(f"{path}: activation_fn: found {activation!r:.80}, expected relu or topk")
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
                f"{path}: {field}: found {config[field]!r:.80}, expected {accepted[0]!r}, which is implemented"
            )
    return config


def _major(path: Path, version: Any) -> int:
    """The first number of a version."""
    first = str(version).split(".")[0]
    if not re.fullmatch("[0-9]{1,9}", first):
        raise InputError(f"{path}: metadata.sae_lens_version: found {version!r:.40}, expected a version such as 6.0.0")
    return int(first)


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


def _exported(described: Description) -> dict[str, np.ndarray]:
    """What SAELens reads: one threshold per latent."""
    exported = dict(described.tensors)
    if ROWS[described.form].trained_as:
        exported["threshold"] = np.full(exported["b_enc"].shape, exported["threshold"])
    return {name: np.asarray(tensor, order="C") for name, tensor in exported.items()}  # else wrong bytes are written


def _config(module: AbstractDictionary, described: Description, metadata: dict[str, Any]) -> dict[str, Any]:
    """SAELens' cfg.json."""
    row, details = ROWS[described.form], described.details
    named = module.transcodes or module.writes != module.reads or "hook_name_out" in metadata
    transcodes = not module.several_sites and named
    stale = {"training_architecture", "training_architecture_details"}  # of a form this SAE may have been loaded as
    metadata = {name: value for name, value in metadata.items() if name not in stale}
    if row.trained_as:
        trained = {"k": details["k"], "matryoshka_widths": list(details.get("widths", ()))}
        metadata |= {"training_architecture": row.trained_as, "training_architecture_details": trained}
    config = {
        "architecture": row.transcoder if transcodes else row.architecture,
        "d_in": module.reads[-1],
        "d_sae": module.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": module.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_training_version": None, **metadata, "sae_lens_version": SAE_LENS_VERSION},
    }
    if transcodes:
        config["d_out"] = module.writes[-1]
    if details and not row.trained_as:
        config |= {**details, "rescale_acts_by_decoder_norm": False}
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
