"""What a run trains on the same activations: one member for each combination of the values that are swept."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from qwen_lab import places
from qwen_lab.errors import InputError
from qwen_lab.places import Place
from qwen_lab.settings import RunConfig, check, form_of

SWEEPABLE = {
    "k": int,
    "lr": float,
    "seed": int,
    "sparsity": float,
    "layer": int,
    "site": str,
    "mlp": int,
    "mlp_in": int,
}
MLPS = {"mlp": "resid_mid", "mlp_in": "mlp_in"}  # axis of blocks -> what the transcoders of their MLPs read


@dataclasses.dataclass(frozen=True)
class Member:
    """One dictionary of a run, which may be a sweep."""

    name: str
    config: RunConfig  # with its own values
    place: Place


def combinations(config: RunConfig) -> list[dict[str, Any]]:
    """The values of every combination, checked; one empty dict without a sweep."""
    axes: dict[str, list[Any]] = {}
    for axis in config.sweep:
        name, _, values = axis.partition("=")
        if name in axes:
            raise InputError(f"--sweep: found {name} twice, expected one axis such as {name}=2,4")
        try:
            axes[name] = [SWEEPABLE[name](value) for value in values.split(",")]
        except (KeyError, ValueError):
            names = ", ".join(SWEEPABLE)
            raise InputError(f"--sweep: found {axis!r}, expected NAME=value,value with NAME of {names}") from None
        if len(set(axes[name])) != len(axes[name]):
            raise InputError(f"--sweep: found {axis!r}, expected each value once")
    if found := axes.keys() & MLPS.keys():
        name = min(found)
        if len(axes.keys() & {"site", "layer", *MLPS}) > 1:
            raise InputError(
                f"--sweep: found {name} beside another axis of places, expected one of mlp, layer and site"
            )
        axes = {"site" if axis == name else axis: values for axis, values in axes.items()}
        axes["site"] = [places.mlps([layer], MLPS[name]) for layer in axes["site"]]
    combined = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    for values in combined:
        check(dataclasses.replace(config, **values))
    return combined


def make_members(
    config: RunConfig, combined: Sequence[dict[str, Any]], known: Callable[[str], str], default: str | None
) -> list[Member]:
    """One member a combination, named after its place (if that is swept) and its values.

    `known` spells a site or refuses it; `default` is the site where none is named.
    """
    members = []
    for values in combined:
        each = dataclasses.replace(config, sweep=(), **values)
        place = places.from_flags(known, default, each, form_of(config))
        parts = [str(place) if name in ("layer", "site") else f"{name}{value:g}" for name, value in values.items()]
        members.append(Member("-".join(parts) or "sae", each, place))
    names = [member.name for member in members]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"--sweep: found {twice} twice, expected each once")
    if len({(member.place.transcodes, len(member.place.reads)) for member in members}) != 1:
        raise InputError(
            "--sweep: found places of several kinds, expected one kind: their dictionaries differ in shape"
        )
    return members


def sites_of(members: Sequence[Member]) -> tuple[str, ...]:
    """Every site that is read or written, once."""
    return tuple(dict.fromkeys(site for member in members for site in member.place.sites))
