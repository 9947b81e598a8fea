"""Where a model lies: an embedded name, a local directory, or a hub id fetched by huggingface_hub."""

import re
from pathlib import Path

from qwen_eqx.errors import InputError
from qwen_eqx.files import local_path, read_json

EMBEDDED = Path(__file__).parent.parent / "pretrained"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WANTED = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
    "model*.safetensors",
]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def embedded_models() -> list[str]:
    """The models that come with the package."""
    return sorted(path.parent.name for path in EMBEDDED.glob(f"*/{CONFIG}"))


def locate(name_or_dir: str | Path, revision: str | None = None) -> Path:
    """The directory of an embedded name, a local directory or a hub id, tried in that order."""
    name = str(name_or_dir)
    local = EMBEDDED / name if name in embedded_models() else local_path(name, "model")
    if name and local.is_dir():
        if revision is not None:
            raise InputError(f"revision: found {revision!r} for {name!r}, expected none: only a hub id has revisions")
        return local
    if name and local.exists():
        raise InputError(f"model: found {name!r}, which is a file, expected the directory it lies in")
    if isinstance(name_or_dir, Path) or not _HUB_ID.fullmatch(name):
        names = ", ".join(embedded_models())
        raise InputError(
            f"model: found {name!r}, expected an embedded name ({names}), a directory, or a hub id ORG/NAME"
        )
    return _fetch(name, revision)


def weight_files(directory: Path) -> dict[str, set[str] | None]:
    """The weight files of a directory, each with the tensors its index promises; None where there is no index."""
    if (directory / WEIGHTS).exists():  # transformers prefers it to an index too
        return {WEIGHTS: None}
    if not (directory / INDEX).exists():
        others = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pth") for path in directory.glob(pattern))
        instead = others[0] if others else "neither"
        raise InputError(f"{directory}: found {instead}, expected {WEIGHTS} or {INDEX}: only safetensors are read")
    where = f"{directory / INDEX}: weight_map"
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{where}: found {weight_map!r}, expected an object of tensor name: file name")
    files: dict[str, set[str] | None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _plain_name(name):
            raise InputError(f"{where}: {tensor}: found {name!r}, expected the plain name of a .safetensors file")
        files[name] = {*(files.get(name) or ()), tensor}
    return files


def _plain_name(name: str) -> bool:
    # anything else could point out of the directory
    return re.fullmatch(r"[\w-][\w.-]*\.safetensors", name, re.ASCII) is not None


def _fetch(name: str, revision: str | None) -> Path:
    import huggingface_hub  # here: the import takes a while, and reads the environment once
    from huggingface_hub import constants, errors

    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    asked = f"model: hub id {name!r}" + (f" at revision {revision!r}" if revision else "")
    names = ", ".join(embedded_models())
    remedy = f"fetch it with `{command}` where there is a network, or take an embedded model: {names}"
    try:
        directory = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"{asked}: found {_reason(error)}, expected a model and revision you may read") from None
    except errors.LocalEntryNotFoundError:
        cache = constants.HF_HUB_CACHE
        raise InputError(
            f"{asked}: found nothing cached in {cache} and no network, expected either; {remedy}"
        ) from None
    except Exception as error:  # what a network or a disk can do wrong has many names
        raise InputError(f"{asked}: found {_reason(error)}, expected to fetch it; {remedy}") from None
    missing = missing_files(directory)
    if missing:  # offline, huggingface_hub hands back whatever part of a snapshot it has
        raise InputError(f"{asked}: found a partial snapshot in {directory} without {', '.join(missing)}; {remedy}")
    return directory


def missing_files(directory: Path) -> list[str]:
    """The files a model needs that a snapshot lacks."""
    needed = [CONFIG, "tokenizer.json"]
    if (directory / WEIGHTS).exists() or (directory / INDEX).exists():
        needed += weight_files(directory)
    else:
        needed.append(WEIGHTS)
    return [name for name in needed if not (directory / name).exists()]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split())[:200]})"
