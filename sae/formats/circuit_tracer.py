"""circuit-tracer's sets of transcoders, per layer and across layers: read row by row, written from what is trained here.

Facts of circuit-tracer 0.5.0 (transcoder/single_layer_transcoder.py, cross_layer_transcoder.py, utils/hf_utils.py).
Per layer y = z · W_dec + b_dec + x · W_skipᵀ; across layers the skip is x · W_skip, not transposed.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

from sae import files
from sae.errors import InputError
from sae.forms.transcoders import Layer, Transcoders

CONFIG, KIND = "config.yaml", "model_kind"
PER_LAYER, CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"
READS, WRITES = ("hook_resid_mid", "mlp.hook_in", "ln2.hook_normalized"), ("hook_mlp_out", "mlp.hook_out")
_THRESHOLD = "activation_function.threshold"
_MAX_CONFIG = 2**20  # bytes: a line for each layer
Tensors = dict[str, np.ndarray]


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a config.yaml, with the hooks that it names or that are meant where it names none."""
    try:
        text = path.read_bytes()[: _MAX_CONFIG + 1]
        config = yaml.safe_load(text) if len(text) <= _MAX_CONFIG else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}, expected circuit-tracer's configuration") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: found no valid YAML ({reason:.120}), expected circuit-tracer's fields") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: found {type(config).__name__}, expected fields such as {KIND}")
    if config.get(KIND) not in (PER_LAYER, CROSS_LAYER):
        raise InputError(f"{path}: {KIND}: found {config.get(KIND)!r:.80}, expected {PER_LAYER} or {CROSS_LAYER}")
    usual = {"feature_input_hook": READS[0], "feature_output_hook": WRITES[0]} if config[KIND] == CROSS_LAYER else {}
    config = {**usual, **config}
    for name, known in (("feature_input_hook", READS), ("feature_output_hook", WRITES)):
        if config.get(name) not in known:
            raise InputError(f"{path}: {name}: found {config.get(name)!r:.80}, expected one of {', '.join(known)}")
    named = config.get("transcoders", [""])
    if not isinstance(named, list) or not named or not all(isinstance(each, str) for each in named):
        raise InputError(f"{path}: transcoders: found {named!r:.80}, expected a list of files")
    return config


def read_circuit_tracer(directory: Path, named: Mapping[str, Path] | None = None) -> Transcoders:
    """The set in a directory; no row is read before it is asked for.

    `named`: where those files lie that config.yaml names by address, if not here under their last name.
    """
    path = directory / CONFIG
    config = read_config(path)
    metadata = {name: config[name] for name in ("model_name", "scan") if name in config}
    if config[KIND] == CROSS_LAYER:
        layers = _cross_layer(directory)
    else:
        places = [_named(path, each, named or {}) for each in config.get("transcoders", [])]
        if len(set(places)) != len(places):
            raise InputError(f"{path}: transcoders: found the same file twice, expected one for each layer")
        layers = [_per_layer(place) for place in places or _numbered(directory, "layer")]
    try:
        return Transcoders(tuple(layers), config["feature_input_hook"], config["feature_output_hook"], metadata)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None


def _named(path: Path, name: str, named: Mapping[str, Path]) -> Path:
    """A file that config.yaml names: given, or inside the directory; never one elsewhere on this machine."""
    if name in named:
        return named[name]
    inner = PurePosixPath(name.partition("?")[0].rpartition("/")[2] if is_address(name) else name)
    place = path.parent / inner
    if inner.is_absolute() or ".." in inner.parts or inner.suffix != ".safetensors" or not place.is_file():
        raise InputError(f"{path}: transcoders: found {name!r:.120}, expected a safetensors file in {path.parent}")
    return place


def is_address(name: str) -> bool:
    """Whether a file that config.yaml names lies on the hub: hf://org/repository/file?revision=branch."""
    return name.startswith("hf://")


def _numbered(directory: Path, stem: str) -> list[Path]:
    """STEM_0.safetensors and on; none may be missing."""
    count = len(list(directory.glob(f"{stem}_*.safetensors")))
    paths = [directory / f"{stem}_{layer}.safetensors" for layer in range(max(count, 1))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{directory}: found {count} files {stem}_*.safetensors and no {missing[0]}, expected every layer"
        )
    return paths


def _per_layer(path: Path) -> Layer:
    tensors = files.map_tensors(path)
    d_sae, d_model = _widths(path, tensors, "W_enc")
    shapes = {"W_enc": (d_sae, d_model), "W_dec": (d_sae, d_model), "b_enc": (d_sae,), "b_dec": (d_model,)}
    _check(path, tensors, shapes, {"W_skip": (d_model, d_model), _THRESHOLD: (d_sae,)})
    skip = tensors.get("W_skip")
    return Layer(
        encoder=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        decoder=tensors["W_dec"][:, None],
        b_dec=tensors["b_dec"],
        threshold=tensors.get(_THRESHOLD),
        skip=None if skip is None else skip.T,
    )


def _cross_layer(directory: Path) -> list[Layer]:
    paths = _numbered(directory, "W_enc")
    layers = []
    for at, path in enumerate(paths):
        tensors, rows = files.map_tensors(path), directory / f"W_dec_{at}.safetensors"
        d_sae, d_model = _widths(path, tensors, f"W_enc_{at}")
        shapes = {f"W_enc_{at}": (d_sae, d_model), f"b_enc_{at}": (d_sae,), f"b_dec_{at}": (d_model,)}
        _check(path, tensors, shapes, {f"threshold_{at}": (d_sae,), f"W_skip_{at}": (d_model, d_model)})
        written = files.map_tensors(rows)
        _check(rows, written, {f"W_dec_{at}": (d_sae, len(paths) - at, d_model)}, {})
        layers.append(
            Layer(
                encoder=tensors[f"W_enc_{at}"],
                b_enc=tensors[f"b_enc_{at}"],
                decoder=written[f"W_dec_{at}"],
                b_dec=tensors[f"b_dec_{at}"],
                threshold=tensors.get(f"threshold_{at}"),
                skip=tensors.get(f"W_skip_{at}"),
            )
        )
    return layers


def _widths(path: Path, tensors: Tensors, name: str) -> tuple[int, int]:
    """Latents and width of an encoder."""
    shape = tensors[name].shape if name in tensors else ()
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}: {name}: found {list(shape) or 'nothing'}, expected a matrix [latents, d_model]")
    return shape[0], shape[1]


def _check(
    path: Path, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]
) -> None:
    """All that is wrong with the header of a file, in one InputError."""
    known = {**shapes, **optional}
    problems = [f"{name}: missing" for name in shapes if name not in tensors]
    problems += [f"{name}: unexpected" for name in sorted(tensors) if name not in known]
    for name, tensor in tensors.items():
        if name in known and tensor.shape != known[name]:
            problems.append(f"{name}: found shape {tensor.shape}, expected {known[name]}")
        if not tensor.dtype.name.startswith(("float", "bfloat")):
            problems.append(f"{name}: found {tensor.dtype.name}, expected floating point")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")


def save_transcoders(transcoders: Transcoders, directory: str | Path) -> None:
    """Write a set as circuit-tracer reads it; `metadata` of the set may hold its `model_name` and `scan`.

    Its rows are those of the set, with all that is done to the input in them: it computes the same there.
    """
    for kind, site, known in (("input", transcoders.input_site, READS), ("output", transcoders.output_site, WRITES)):
        if site not in known:
            raise InputError(f"{kind}_site: found {site}, expected one that circuit-tracer knows: {', '.join(known)}")
    if any(layer.rule is not None for layer in transcoders.layers):
        raise InputError(
            "transcoders: found a TopK or Gated one, expected ReLU or one threshold a latent, which is all circuit-tracer "
            "has: train --form batchtopk, jumprelu or relu"
        )
    home = Path(directory)
    files.make_directory(home)
    if (home / CONFIG).exists() or any(home.glob("*.safetensors")):
        raise InputError(f"{home}: found a set or other tensors, expected a new directory")
    for at, layer in enumerate(transcoders.layers):
        for name, tensors in (_crossing(at, layer) if transcoders.crosses else _alone(at, layer)).items():
            whole = {key: np.ascontiguousarray(value) for key, value in tensors.items() if value is not None}
            files.commit(home / f"{name}.safetensors", safetensors.numpy.save(whole))
    said = {name: str(transcoders.metadata[name]) for name in ("model_name", "scan") if name in transcoders.metadata}
    hooks = {"feature_input_hook": transcoders.input_site, "feature_output_hook": transcoders.output_site}
    config = {**said, KIND: CROSS_LAYER if transcoders.crosses else PER_LAYER, **hooks}
    files.commit(home / CONFIG, yaml.safe_dump(config, sort_keys=False).encode())  # last: a set without it is no set


def _alone(at: int, layer: Layer) -> dict[str, dict[str, np.ndarray | None]]:
    skip = None if layer.skip is None else layer.skip.T
    rows = {"W_enc": layer.encoder, "W_dec": layer.decoder[:, 0], "b_enc": layer.b_enc, "b_dec": layer.b_dec}
    return {f"layer_{at}": {**rows, _THRESHOLD: layer.threshold, "W_skip": skip}}


def _crossing(at: int, layer: Layer) -> dict[str, dict[str, np.ndarray | None]]:
    rows = {"W_enc": layer.encoder, "b_enc": layer.b_enc, "b_dec": layer.b_dec}
    rows |= {"threshold": layer.threshold, "W_skip": layer.skip}
    return {
        f"W_enc_{at}": {f"{name}_{at}": value for name, value in rows.items()},
        f"W_dec_{at}": {f"W_dec_{at}": layer.decoder},
    }
