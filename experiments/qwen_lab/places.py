"""Where in a model a dictionary works: blocks and sites by flag, the site it reads and the one it writes."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import qwen_eqx
import sae
from qwen_lab.errors import InputError

# of one block, in the order in which they are computed
SUFFIXES = (
    "hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_attn_out", "hook_resid_mid",
    "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """A transcoder reads one site and writes another, an autoencoder writes what it reads."""

    reads: str
    writes: str

    def __post_init__(self) -> None:
        before, after = _depth(self.reads), _depth(self.writes)
        if before and after and after < before:
            raise InputError(
                f"--target-site: found {self.writes}, which the model computes before {self.reads}, expected a later site"
            )

    @property
    def transcodes(self) -> bool:
        return self.reads != self.writes

    def __str__(self) -> str:
        return f"{self.reads}-to-{self.writes}" if self.transcodes else self.reads

    @property
    def metadata(self) -> dict[str, str]:
        """In SAELens' words."""
        return {"hook_name": self.reads} | ({"hook_name_out": self.writes} if self.transcodes else {})


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """A dictionary where it works; `metadata` is what a saved one says of its training."""

    name: str
    module: sae.AbstractSAE
    place: Place
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_layers(text: str, layers: int) -> list[int]:
    """`late`, `all`, `10:24` or `3,5,7`, as block numbers of a model with `layers` blocks."""
    if text in ("late", "all"):
        return list(range(min(math.ceil(0.4 * layers), layers - 1) if text == "late" else 0, layers))
    try:
        if ":" in text:
            low, high = (
                int(part) if part else default for part, default in zip(text.split(":"), (0, layers), strict=True)
            )
            chosen = list(range(low, high))
        else:
            chosen = [int(part) for part in text.split(",")]
    except ValueError:
        chosen = []
    if not chosen or not all(0 <= layer < layers for layer in chosen):
        raise InputError(
            f"--layers: found {text!r}, expected late, all, a range such as 1:{layers} or a list such as 0,{layers - 1}; "
            f"the model has blocks 0 to {layers - 1}"
        )
    return chosen


def from_flags(
    known: Callable[[str], str], default: str | None, layer: int | None, site: str | None, target: str | None
) -> Place:
    """The place that --layer or --site (a site, or IN:OUT) and --target-site name; `known` spells a site or refuses it."""
    if layer is not None and site is not None:
        raise InputError(f"--layer, --site: found both ({layer}, {site}), expected one of them")
    name = site or (default if layer is None else f"blocks.{layer}.hook_resid_post")
    if name is None:
        raise InputError("--site: found none and the SAE names none, expected --layer or --site")
    reads, _, writes = name.partition(":")
    if writes and target is not None:
        raise InputError(f"--site, --target-site: found two targets ({writes}, {target}), expected one")
    writes = writes or target
    place = Place(known(reads), known(writes or reads))
    if writes and not place.transcodes:
        raise InputError(
            f"--target-site: found {writes}, the site that is read, expected another; an autoencoder needs none"
        )
    return place


def in_model(config: qwen_eqx.QwenConfig) -> Callable[[str], str]:
    """Spells a site of this model as TransformerLens does."""
    return lambda name: str(qwen_eqx.Site.parse(name, config))


def in_store(store: sae.ActivationStore) -> Callable[[str], str]:
    """Takes the sites that a store holds."""

    def known(name: str) -> str:
        if name not in store.sites:
            raise InputError(f"--site: found {name!r}, expected one that the store holds: {', '.join(store.sites)}")
        return name

    return known


def first_late(config: qwen_eqx.QwenConfig) -> str:
    """The residual stream after the first of the late blocks."""
    return str(qwen_eqx.Site(parse_layers("late", config.layers)[0], "resid_post"))


def _depth(site: str) -> tuple[int, int] | None:
    """When the model computes a site; None for a name that is not TransformerLens'."""
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", site)
    return (int(match[1]), SUFFIXES.index(match[2])) if match and match[2] in SUFFIXES else None
