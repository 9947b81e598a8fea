"""A transcoder for every MLP of a model, from what training left in a directory or comes with the package.

transcoders = sae.load_transcoders("tiny-arc")        # embedded, or a directory with a dictionary for each layer
"""

import re
from pathlib import Path
from typing import Any

from sae.errors import InputError
from sae.formats.load import Loaded, load_with_metadata, locate
from sae.formats.saelens import CONFIG
from sae.forms.abstract import AbstractSAE
from sae.forms.transcoders import Transcoders

_OWN = ("hook_name", "hook_name_out", "training", "training_architecture", "training_architecture_details")


def load_transcoders(source: str | Path) -> Transcoders:
    """The transcoders of all MLPs in a directory that holds a dictionary for each; autoencoders beside them are left."""
    directory = locate(source)
    found: dict[tuple[str, str], dict[int, Loaded]] = {}
    for path in sorted(directory.glob(f"**/{CONFIG}")):
        loaded = load_with_metadata(path.parent)
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
    metadata = {name: value for name, value in layers[0].metadata.items() if name not in _OWN}
    return Transcoders.of([each for each in modules if isinstance(each, AbstractSAE)], *kinds, metadata)


def _place(metadata: dict[str, Any]) -> tuple[int, str, str] | None:
    """(block, kind that is read, kind that is written) of a transcoder of one block; None for anything else."""
    names = metadata.get("hook_name"), metadata.get("hook_name_out")
    reads, writes = (re.fullmatch(r"blocks\.(\d{1,6})\.([\w.]+)", str(name)) for name in names)
    if reads is None or writes is None or reads[1] != writes[1]:
        return None
    return int(reads[1]), reads[2], writes[2]
