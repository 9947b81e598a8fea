"""SAEs from anywhere: a directory, a file, a URL or a hub id, in SAELens' form or another team's.

sae.save(module, directory, metadata)
module = sae.load("directory, s3://bucket/folder or org/name[/folder or file]")
"""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import numpy as np
from jaxtyping import Float

from sae import shown, storage
from sae.errors import InputError
from sae.formats.description import Description, build
from sae.formats.dictionary_learning import read_dictionary_learning
from sae.formats.gemma_scope import read_gemma_scope
from sae.formats.qwen_scope import read_qwen_scope
from sae.formats.saelens import CONFIG, SPARSITY, WEIGHTS, read_density, read_saelens
from sae.formats.sparsify import read_sparsify
from sae.forms.abstract import AbstractDictionary

EMBEDDED = Path(__file__).parent.parent / "pretrained"
READERS: dict[str, Callable[[Path], Description]] = {  # the file that gives a directory away -> its reader
    "sae.safetensors": lambda directory: read_sparsify(directory),
    "ae.pt": lambda directory: read_dictionary_learning(directory / "ae.pt"),
    "params.npz": lambda directory: read_gemma_scope(directory / "params.npz"),
    "params.safetensors": lambda directory: read_gemma_scope(directory / "params.safetensors"),
}


class Loaded(NamedTuple):
    """An SAE with what its directory says of it."""

    module: AbstractDictionary
    metadata: dict[str, Any]  # model_name, hook_name and whatever else was saved
    density: Float[np.ndarray, " d_sae"] | None  # fraction of tokens on which each latent fired

    def __repr__(self) -> str:
        density = None if self.density is None else shown.short(self.density)
        return f"Loaded({self.module}, metadata of {shown.listed(sorted(self.metadata), 4)}, density={density})"


def embedded() -> list[str]:
    """The SAEs that come with the package, as MODEL/SITE."""
    return sorted(str(path.parent.relative_to(EMBEDDED)) for path in EMBEDDED.glob(f"*/*/{CONFIG}"))


def locate(source: str | Path) -> Path:
    """Where an embedded name (one SAE's, or a model's for all of them) lies; anything else is the path that it says."""
    names = {*embedded(), *(name.partition("/")[0] for name in embedded())}
    return EMBEDDED / source if str(source) in names else Path(source)


def load(source: str | Path, *, revision: str | None = None, k: int | None = None) -> AbstractDictionary:
    """The SAE of an embedded name, in a directory or file of any known format, or at a hub id.

    Tried in that order; a hub id is `org/name`, `org/name/folder` or `…/file`.
    """
    return load_with_metadata(source, revision=revision, k=k).module


def load_with_metadata(source: str | Path, *, revision: str | None = None, k: int | None = None) -> Loaded:
    """As `load`, with metadata and densities; `k` is for Qwen-Scope files whose path does not name it."""
    if isinstance(source, str) and storage.is_url(source):
        return _load_from(storage.place(source), k)
    path = locate(source)
    if not path.exists():
        path = _download(str(source), revision)
    description = read_saelens(path) if (path / WEIGHTS).is_file() else _read_foreign(path, k)
    if k is not None and not _is_qwen_scope(path):
        raise InputError(f"k: found {k}, expected none: {source} says its own, only Qwen-Scope's files may not")
    module = build(path, description)
    return Loaded(module, dict(description.metadata), read_density(path, module.d_sae))


def _load_from(home: storage.Place, k: int | None) -> Loaded:
    """What stands at a URL: of one file, or of the files in a folder that any format knows."""
    folder, one = home, ""
    if home.size() is not None:  # a file, and what dictionary_learning keeps beside it
        above, _, one = str(home).rpartition("/")
        folder = storage.place(above)
    known = {CONFIG, WEIGHTS, SPARSITY, "config.json", *READERS}
    names = [name for name, size in folder.sizes().items() if size is not None]
    wanted = [name for name in names if name in (one, "config.json") or (not one and (name in known or _is_qwen(name)))]
    if not wanted:
        raise InputError(f"{home}: found no file of a dictionary, expected {WEIGHTS}, {', '.join(READERS)} or *.sae.pt")
    with tempfile.TemporaryDirectory(prefix="sae-") as copy:
        for name in wanted:
            (Path(copy) / name).write_bytes((folder / name).read())
        try:
            return load_with_metadata(Path(copy) / one, k=k)
        except InputError as error:
            raise InputError(str(error).replace(copy, str(folder))) from None


def _is_qwen(name: str) -> bool:
    return name.endswith(".sae.pt")


def _read_foreign(path: Path, k: int | None) -> Description:
    """The description of a file or directory that is not SAELens', told by its file names."""
    if path.is_file():
        if path.name.endswith(".sae.pt"):
            return read_qwen_scope(path, k)
        if path.name == "ae.pt":
            return read_dictionary_learning(path)
        if path.suffix == ".npz" or path.name == "params.safetensors":
            return read_gemma_scope(path)
        raise InputError(f"{path}: found no known SAE file, expected ae.pt, params.npz, params.safetensors or *.sae.pt")
    for name, read in READERS.items():
        if (path / name).is_file():
            return read(path)
    layers = sorted(each.name for each in path.glob("*.sae.pt"))
    if len(layers) == 1:
        return read_qwen_scope(path / layers[0], k)
    expected = f"one of {layers[0]} … {layers[-1]}" if layers else f"a directory with {WEIGHTS}, {', '.join(READERS)}"
    raise InputError(f"{path}: found {len(layers)} *.sae.pt and no other known SAE, expected {expected}")


def _is_qwen_scope(path: Path) -> bool:
    return path.name.endswith(".sae.pt") or (path.is_dir() and any(path.glob("*.sae.pt")))


def _download(source: str, revision: str | None) -> Path:
    """The files of one SAE at a hub id, fetched or from the cache."""
    repository, inner = hub_parts(source)
    if inner.endswith((".pt", ".npz", ".safetensors")):
        wanted = [inner]
        if inner.endswith("ae.pt") and not inner.endswith(".sae.pt"):
            wanted.append(os.path.join(os.path.dirname(inner), "config.json"))
    else:
        names = [CONFIG, WEIGHTS, SPARSITY, "config.json", *READERS]
        wanted = [f"{inner}/{name}" if inner else name for name in names]
    path = fetched(source, repository, revision, wanted) / inner
    if not path.exists():
        raise InputError(f"{source}: found no {inner} in {repository}, expected the folder or file of one SAE")
    return path


def hub_parts(source: str) -> tuple[str, str]:
    """(org/name, what is inside it) of a hub id."""
    parts = source.split("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.=,-]+)*", source) or set(parts) & {".", ".."}:
        raise InputError(f"{source}: found no such file or directory, expected one or a hub id org/name[/folder]")
    return "/".join(parts[:2]), "/".join(parts[2:])


def fetched(source: str, repository: str, revision: str | None, wanted: list[str]) -> Path:
    """Where those files of a hub repository lie that match the patterns `wanted`, fetched or from the cache."""
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        cache = huggingface_hub.constants.HF_HUB_CACHE
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source}: found no local path and could not fetch {repository} ({type(error).__name__}: {reason:.120}), "
            f"expected one or the other; fetch it where there is a network with `hf download {repository} --include "
            f"'{wanted[0]}'` into the cache {cache}"
        ) from None
