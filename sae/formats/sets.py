"""A transcoder for every MLP of a model, from anywhere: circuit-tracer's sets, or dictionaries that were trained here.

transcoders = sae.load_transcoders("tiny-arc")        # embedded; or a directory, or a hub id org/name[/folder]
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from sae.errors import InputError
from sae.formats import circuit_tracer
from sae.formats.load import Loaded, fetched, hub_parts, load_with_metadata, locate
from sae.formats.saelens import CONFIG
from sae.forms.abstract import AbstractSAE
from sae.forms.clt import CLT
from sae.forms.transcoders import Transcoders

_OWN = ("hook_name", "hook_name_out", "training", "training_architecture", "training_architecture_details")


def load_transcoders(source: str | Path, *, revision: str | None = None) -> Transcoders:
    """The transcoders of all MLPs: circuit-tracer's, in a directory or at a hub id, or those that were trained here.

    Of circuit-tracer's no row is read before it is asked for. Trained here are an embedded model's, or a directory that
    holds a dictionary for each block; autoencoders beside them are left.
    """
    directory, named = locate(source), {}
    if not directory.exists():
        directory, named = _fetch(str(source), revision)
    if (directory / circuit_tracer.CONFIG).is_file():
        return circuit_tracer.read_circuit_tracer(directory, named)
    return _trained(source, directory)


def _fetch(source: str, revision: str | None) -> tuple[Path, dict[str, Path]]:
    """Where circuit-tracer's files at a hub id lie, and those that its config.yaml names by address."""
    repository, inner = hub_parts(source)
    path = fetched(source, repository, revision, [str(PurePosixPath(inner, circuit_tracer.CONFIG))])
    path = path / inner / circuit_tracer.CONFIG
    if not path.is_file():
        raise InputError(f"{source}: found no {circuit_tracer.CONFIG} in {repository}, expected circuit-tracer's")
    names = circuit_tracer.read_config(path).get("transcoders")
    if names is None:
        fetched(source, repository, revision, [str(PurePosixPath(inner, "*.safetensors"))])
    named = {name: _addressed(source, name) for name in names or () if circuit_tracer.is_address(name)}
    return path.parent, named


def _addressed(source: str, name: str) -> Path:
    """The file at hf://org/repository/file?revision=branch."""
    address, _, query = name.removeprefix("hf://").partition("?")
    repository, inner = hub_parts(address)
    revision = query.removeprefix("revision=") or None
    path = fetched(source, repository, revision, [inner]) / inner
    if not path.is_file():
        raise InputError(f"{source}: found no {inner} in {repository}, expected it as {circuit_tracer.CONFIG} names it")
    return path


def _trained(source: str | Path, directory: Path) -> Transcoders:
    found: dict[tuple[str, str], dict[int, Loaded]] = {}
    for path in sorted(directory.glob(f"**/{CONFIG}")):
        loaded = load_with_metadata(path.parent)
        if isinstance(loaded.module, CLT):
            return _across(path.parent, loaded.module, loaded.metadata)
        if (place := _place(loaded.metadata)) is None:
            continue
        layer, *kinds = place
        same = found.setdefault((kinds[0], kinds[1]), {})
        if layer in same:
            raise InputError(f"{source}: found two transcoders of block {layer}, expected one for each")
        same[layer] = loaded
    if len(found) != 1:
        pairs = ", ".join(" to ".join(kinds) for kinds in found) or "none"
        raise InputError(f"{source}: found transcoders of {pairs}, expected those of one pair of sites")
    ((kinds, layers),) = found.items()
    missing = [str(layer) for layer in range(max(layers) + 1) if layer not in layers]
    if missing:
        raise InputError(f"{source}: found no transcoder of block {', '.join(missing)}, expected one for every block")
    modules = [loaded.module for _, loaded in sorted(layers.items())]
    several = [module for module in modules if not isinstance(module, AbstractSAE)]
    if several:
        raise InputError(f"{source}: found a {several[0].name}, expected dictionaries that write one site")
    single = [each for each in modules if isinstance(each, AbstractSAE)]
    return Transcoders.of(single, *kinds, _said(layers[0].metadata))


def _across(directory: Path, module: CLT, metadata: dict[str, Any]) -> Transcoders:
    """A cross-layer transcoder, whose sites have to be those of all blocks in order."""
    kinds = []
    for name in ("hook_name", "hook_name_out"):
        sites = str(metadata.get(name)).split("+")
        kinds.append(sites[0].removeprefix("blocks.0."))
        expected = [f"blocks.{layer}.{kinds[-1]}" for layer in range(module.sites)]
        if sites != expected:
            raise InputError(f"{directory}: {name}: found {sites}, expected a site of each block, such as {expected}")
    return Transcoders.of(module, kinds[0], kinds[1], _said(metadata))


def _said(metadata: dict[str, Any]) -> dict[str, Any]:
    """What dictionaries say that is true of all of a set."""
    return {name: value for name, value in metadata.items() if name not in _OWN}


def _place(metadata: dict[str, Any]) -> tuple[int, str, str] | None:
    """(block, kind that is read, kind that is written) of a transcoder of one block; None for anything else."""
    names = metadata.get("hook_name"), metadata.get("hook_name_out")
    reads, writes = (re.fullmatch(r"blocks\.(\d{1,6})\.([\w.]+)", str(name)) for name in names)
    if reads is None or writes is None or reads[1] != writes[1]:
        return None
    return int(reads[1]), reads[2], writes[2]
