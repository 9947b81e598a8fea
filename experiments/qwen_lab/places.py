"""Where in a model a dictionary works: blocks and sites by flag, the site it reads and the one it writes."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

import qwen_eqx
import sae
from qwen_lab.errors import InputError
from sae import shown

JOINED = "+"  # between the sites of a dictionary that reads several


@dataclasses.dataclass(frozen=True)
class Place:
    """An autoencoder writes the sites it reads, a transcoder others: of each that it reads a later one."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def __post_init__(self) -> None:
        for sites in (self.reads, self.writes):
            if len(set(sites)) != len(sites):
                raise InputError(f"--site: found {JOINED.join(sites)}, expected each site once")
        if self.transcodes and len(self.reads) != len(self.writes):
            raise InputError(
                f"--target-site: found {len(self.writes)} sites, expected {len(self.reads)}: as many as are read"
            )
        for read, write in zip(self.reads, self.writes, strict=True):
            before, after = map(qwen_eqx.Site.spelled, (read, write))
            if before and after and after < before and self.transcodes:
                raise InputError(
                    f"--target-site: found {write}, which the model computes before {read}, expected a later site"
                )

    @property
    def transcodes(self) -> bool:
        return self.reads != self.writes

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that is read or written, once."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    @property
    def written(self) -> str:
        """The sites that it writes, as a flag spells them."""
        return JOINED.join(self.writes)

    def __str__(self) -> str:
        read = JOINED.join(self.reads)
        return f"{read}-to-{self.written}" if self.transcodes else read

    @property
    def metadata(self) -> dict[str, str]:
        """In SAELens' words."""
        out = {"hook_name_out": self.written} if self.transcodes else {}
        return {"hook_name": JOINED.join(self.reads)} | out


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """A dictionary where it works; `metadata` is what a saved one says of its training."""

    name: str
    module: sae.AbstractDictionary
    place: Place
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def _repr_html_(self) -> str:
        said = {str(name): value for name, value in self.metadata.items()}
        own = {"dictionary": self.name, "is": repr(self.module), "reads": self.place.reads, "writes": self.place.writes}
        return shown.as_html("Dictionary", own | {name: said[name] for name in said if name not in own})

    def read(self, acts: Mapping[str, Float[Array, "rows d_model"]]) -> Float[Array, "rows ..."]:
        """The rows that it reads, of what stands at each site."""
        return _rows(acts, self.place.reads, self.module.several_sites)

    def target(self, acts: Mapping[str, Float[Array, "rows d_model"]]) -> Float[Array, "rows ..."]:
        """The rows that it is to write."""
        return _rows(acts, self.place.writes, self.module.several_sites)

    def by_site(self, rows: Float[Array, "rows ..."]) -> dict[str, Float[Array, "rows d_model"]]:
        """What it wrote (or its decoder's rows), site by site."""
        each = [rows[:, at] for at in range(rows.shape[1])] if self.module.several_sites else [rows]
        return dict(zip(self.place.writes, each, strict=True))


def _rows(acts: Mapping[str, Array], sites: Sequence[str], several: bool) -> Array:
    return jnp.stack([acts[site] for site in sites], axis=1) if several else acts[sites[0]]


@runtime_checkable
class Flags(Protocol):
    """The flags that name a place: a block or a site (a site, IN:OUT, or A+B for several side by side), and a target."""

    @property
    def layer(self) -> int | None: ...
    @property
    def site(self) -> str | None: ...
    @property
    def target_site(self) -> str | None: ...


def parse_layers(text: str, layers: int) -> list[int]:
    """`late`, `all`, `10:24` or `3,5,7`, as block numbers of a model with `layers` blocks."""
    if text in ("late", "all"):
        return list(range(min(math.ceil(0.4 * layers), layers - 1) if text == "late" else 0, layers))
    try:
        if ":" in text:
            low, high = (
                int(part) if part else default for part, default in zip(text.split(":"), (0, layers), strict=True)
            )
            chosen = list(range(low, high)) if 0 <= low < high <= layers else []
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
    known: Callable[[str], str],
    default: str | None,
    flags: Flags,
    form: type[sae.AbstractDictionary],
) -> Place:
    """The place that these flags name, or the default; `known` spells a site or refuses it."""
    layer, site, target = flags.layer, flags.site, flags.target_site
    if layer is not None and site is not None:
        raise InputError(f"--layer, --site: found both ({layer}, {site}), expected one of them")
    named = default if layer is None else mlps([layer]) if form.transcodes else f"blocks.{layer}.hook_resid_post"
    name = site or named
    if name is None:
        raise InputError("--site: found none and the SAE names none, expected --layer or --site")
    reads, _, writes = name.partition(":")
    if writes and target is not None:
        raise InputError(f"--site, --target-site: found two targets ({writes}, {target}), expected one")
    writes = writes or target
    read, written = (tuple(known(each) for each in sites.split(JOINED)) for sites in (reads, writes or reads))
    place = Place(read, written)
    if writes and not place.transcodes:
        raise InputError(
            f"--target-site: found {writes}, the site that is read, expected another; an autoencoder needs none"
        )
    if form.transcodes and not place.transcodes:
        raise InputError(f"--target-site: found none, expected one: a {form.name} writes a later site than it reads")
    if form.several_sites and place.transcodes and not form.transcodes:
        raise InputError(f"--target-site: found {writes}, expected none: a {form.name} writes the sites it reads")
    if not form.several_sites and len(place.sites) > 1 + place.transcodes:
        able = ", ".join(name for name, other in sae.FORMS.items() if other.several_sites)
        raise InputError(f"--site: found {reads}, expected one site for a {form.name}; several are read by: {able}")
    return place


def in_model(config: qwen_eqx.QwenConfig) -> Callable[[str], str]:
    """Spells a site of this model as TransformerLens does."""
    return lambda name: str(qwen_eqx.Site.parse(name, config))


def in_store(store: sae.ActivationStore) -> Callable[[str], str]:
    """Takes the sites that a store holds."""
    return among(store.sites)


def among(sites: Sequence[str]) -> Callable[[str], str]:
    """Takes the sites that a store holds or will hold."""

    def known(name: str) -> str:
        if name not in sites:
            raise InputError(f"--site: found {name!r}, expected one that the store holds: {', '.join(sites)}")
        return name

    return known


def default_sites(config: qwen_eqx.QwenConfig, form: type[sae.AbstractDictionary]) -> str:
    """The residual stream after the first of the late blocks; after all of them for a form that reads several sites.

    A form that only transcodes has the MLP of that block, or those of all blocks.
    """
    late = parse_layers("late", config.layers)
    if form.transcodes:
        return mlps(range(config.layers) if form.several_sites else late[:1])
    sites = [str(qwen_eqx.Site(layer, "resid_post")) for layer in late]
    return JOINED.join(sites) if form.several_sites else sites[0]


def default_held(sites: Sequence[str], form: type[sae.AbstractDictionary]) -> str | None:
    """The first site that a store holds; all of them for a form that reads several.

    For a form that only transcodes the first MLP that it holds both ends of, or all; None where there is none.
    """
    if not form.transcodes:
        return JOINED.join(sites) if form.several_sites else sites[0]
    held = [site for site in map(qwen_eqx.Site.spelled, sites) if site is not None and site.kind == "mlp_out"]
    layers = [site.layer for site in sorted(held) if str(qwen_eqx.Site(site.layer, "resid_mid")) in sites]
    return mlps(layers if form.several_sites else layers[:1]) if layers else None


def mlps(layers: Sequence[int], reads: str = "resid_mid") -> str:
    """What the MLPs of these blocks read, before or behind their norm, and what they write, as --site spells it."""
    ends = [[str(qwen_eqx.Site(layer, kind)) for layer in layers] for kind in (reads, "mlp_out")]
    return ":".join(JOINED.join(sites) for sites in ends)
