"""Saved dictionaries put back: the model, place and tasks that flags name, or else what they say of themselves."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import arc
import qwen_eqx
import sae
from qwen_lab import places, wording
from qwen_lab.bounds import Whole
from qwen_lab.errors import InputError
from qwen_lab.meshes import OnMesh
from qwen_lab.places import Dictionary, Place

UNSEEN = "arc-agi-1/evaluation"
EMBEDDED = "tiny-arc/blocks.3.hook_resid_post"  # what commands take that were given none


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnModel(OnMesh):
    """The flags of what puts SAEs into a model; unless said, an SAE's metadata name the model, the place and the tasks."""

    model: str | None = None
    """Embedded name, directory in Hugging Face's layout, or hub id. Without it the model that the SAE names."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, cache and activations."""
    layer: Whole | None = None
    """Residual stream after this block. Without it the site that the SAE names."""
    site: str | None = None
    """Any other place, as TransformerLens or Hugging Face spell it."""
    target_site: str | None = None
    """Site that a transcoder writes. Without it the one that it names."""
    tasks: str | None = None
    """Data set (arc-agi-1|2/training|evaluation, procedural), directory of {id}.json, Kaggle challenges file, or JSONL.
    Without it the SAE's own held-out tasks, or the evaluation set of ARC-AGI-1."""
    encoder: str = wording.AUTO
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal)).
    auto: as the SAE or the model was trained."""
    prompt: str = wording.AUTO
    """Prompt format: a name of arc.PROMPTS. auto: as the SAE or the model was trained."""

    def load_model(self, metadata: Sequence[Mapping[str, Any]]) -> tuple[qwen_eqx.Qwen, qwen_eqx.Tokenizer, str]:
        """The model asked for, or the one that all of these SAEs name; and its name."""
        names = {str(one.get("model_name", wording.MODEL)) for one in metadata}
        if self.model is None and len(names) != 1:
            raise InputError(f"--sae: found SAEs of {', '.join(sorted(names))}, expected one model's, or --model")
        name = self.model or names.pop()
        model, tokenizer = self.open_model(name, self.dtype, self.revision)
        return model, tokenizer, name

    def place(self, config: qwen_eqx.QwenConfig, module: sae.AbstractDictionary, metadata: Mapping[str, Any]) -> Place:
        """The place asked for, or the one the SAE's metadata name; its widths must be the SAE's."""
        reads, writes = metadata.get("hook_name"), metadata.get("hook_name_out")
        target = self.target_site or (str(writes) if writes and writes != reads else None)
        default = None if reads is None else str(reads)
        asked = dataclasses.replace(self, target_site=target)
        place = places.from_flags(places.in_model(config), default, asked, type(module))
        for sites, shape in ((place.reads, module.reads), (place.writes, module.writes)):
            widths = {qwen_eqx.Site.parse(site, config).width(config) for site in sites}
            there = (len(sites), *widths) if module.several_sites else tuple(widths)
            if shape != there:
                given = f"an SAE from {_spelled(module.reads)} to {_spelled(module.writes)}"
                raise InputError(f"--sae: found {given}, expected {_spelled(there)} at {'+'.join(sites)}")
        return place

    def dictionary(self, name: str, loaded: sae.Loaded, config: qwen_eqx.QwenConfig) -> Dictionary:
        """A loaded SAE at its place in a model of this shape."""
        return Dictionary(name, loaded.module, self.place(config, loaded.module, loaded.metadata), loaded.metadata)


def _spelled(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def load_dictionary(source: str | Path, config: qwen_eqx.QwenConfig) -> Dictionary:
    """Any SAE that `sae.load` reads, at the place in a model of this shape that it names."""
    return OnModel().dictionary(Path(source).name, sae.load_with_metadata(source), config)


def unseen_tasks(metadata: Mapping[str, Any], tasks: str | None) -> tuple[str, list[arc.Task]]:
    """The data set asked for, by name; without one the tasks that an SAE's training held out, or ARC-AGI-1's evaluation."""
    held_out = metadata.get("held_out_tasks")
    if held_out is not None and not (isinstance(held_out, list) and all(isinstance(one, str) for one in held_out)):
        raise InputError(f"--sae: its held_out_tasks: found {held_out!r:.80}, expected a list of task ids")
    if tasks is not None or not isinstance(held_out, list) or not isinstance(metadata.get("tasks"), str):
        name = tasks or UNSEEN
        return name, list(arc.load_tasks(name))
    name = metadata["tasks"]
    picked = [task for task in arc.load_tasks(name) if task.id in set(held_out)]
    if not picked:
        raise InputError(f"--tasks: found none of the SAE's held-out tasks in {name}, expected them; name others")
    return name, picked


def find(given: Sequence[str]) -> dict[str, str]:
    """Short name -> place; a directory that holds SAEs stands for all of them."""
    sources = []
    for place in given:
        inside = sorted(map(str, (path.parent for path in sae.locate(place).glob("**/cfg.json"))), key=_numbers_as_such)
        sources += inside if len(inside) > 1 or (inside and inside != [place]) else [place]
    parts = [Path(place).parts for place in sources]
    shared = 0
    while len(sources) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    names = ["-".join(p for p in part[shared if len(sources) > 1 else -1 :] if p != "sae") or "sae" for part in parts]
    if len(set(names)) != len(names):
        raise InputError(f"--sae: found {', '.join(given)}, expected each SAE once")
    return dict(zip(names, sources, strict=True))


def _numbers_as_such(text: str) -> list[tuple[int, str]]:
    """k4 before k16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
