"""Dictionaries in other words: a reader turns files into one description in SAELens' names, `build` makes the module.

Names and orientation: W_enc [d_model, d_sae], W_dec [d_sae, d_out], b_enc, b_dec, threshold, b_gate, b_mag, r_mag; of
several sites W_enc [sites, d_model, d_sae], W_dec [d_sae, sites, d_model], b_dec [sites, d_model].
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sae.errors import InputError
from sae.forms import FORMS
from sae.forms.abstract import AbstractDictionary


@dataclasses.dataclass(frozen=True)
class Description:
    """What a dictionary is, whoever wrote it."""

    form: str  # a key of FORMS
    tensors: Mapping[str, np.ndarray]  # SAELens' names and orientation
    apply_b_dec_to_input: bool
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # k, widths … as found: build checks them
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def stored_names(form: type[AbstractDictionary]) -> dict[str, str]:
    """Field -> its name on disk, of every tensor of a form."""
    static = {field.name for field in dataclasses.fields(form) if field.metadata.get("static")}
    fields = [field.name for field in dataclasses.fields(form) if field.name not in static]
    return {name: name for name in fields} | {"encoder": "W_enc", "decoder": "W_dec"} | dict(form.stored_names)


def describe(module: AbstractDictionary) -> Description:
    """A module in these words."""
    arrays = {disk: np.asarray(getattr(module, name)) for name, disk in stored_names(type(module)).items()}
    tensors = arrays | {"W_enc": np.asarray(module.W_enc)}
    details = {name: getattr(module, name) for name in module.details}
    return Description(module.name, tensors, module.apply_b_dec_to_input, details)


def build(where: Path, description: Description) -> AbstractDictionary:
    """The module of a description, every tensor checked first; all that is wrong is listed in one InputError."""
    form, tensors = FORMS[description.form], description.tensors
    names = stored_names(form)
    needed = set(names.values())
    problems = [f"{name}: missing" for name in sorted(needed - tensors.keys())]
    problems += [f"{name}: unexpected in the form {form.name}" for name in sorted(tensors.keys() - needed)]
    problems += [
        f"{name}: found {tensor.dtype.name}, expected floating point"
        for name, tensor in tensors.items()
        if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")
    try:
        sizes = form.sizes(tensors["W_enc"].shape, tensors["W_dec"].shape)
        details = {name: check(description.details.get(name), sizes["d_sae"]) for name, check in form.details.items()}
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    skeleton = eqx.filter_eval_shape(form.init, **sizes, **details, key=jax.random.key(0))
    arrays = {name: np.asarray(tensors[disk], np.float32) for name, disk in names.items()}
    arrays["encoder"] = np.moveaxis(arrays["encoder"], -1, 0)
    problems = [
        f"{disk}: found shape {tensors[disk].shape}, expected {getattr(skeleton, name).shape}"
        for name, disk in names.items()
        if arrays[name].shape != getattr(skeleton, name).shape
    ]
    problems = problems or [f"{n}: found NaN or infinity" for n, each in tensors.items() if not np.isfinite(each).all()]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")
    fields = {name: jnp.asarray(array) for name, array in arrays.items()}
    return form(**fields, **details, apply_b_dec_to_input=description.apply_b_dec_to_input)


def fold_decoder_norms(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same map with unit decoder rows: ‖W_dec_j‖ moves into the encoder, so latents are in units of the output."""
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    norms = np.maximum(np.linalg.norm(tensors["W_dec"], axis=-1), np.float32(1e-8))
    scaled = {name: tensors[name] * norms for name in ("W_enc", "b_enc") if name in tensors}
    return {**tensors, **scaled, "W_dec": tensors["W_dec"] / norms[:, None]}
