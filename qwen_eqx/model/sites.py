"""Named places in the model: what can be read or edited, in TransformerLens' spelling and in Hugging Face's."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Literal

import jax
from jaxtyping import Array, Float

from qwen_eqx.errors import InputError
from qwen_eqx.model.config import QwenConfig

# kind -> (TransformerLens suffix, Hugging Face module whose output it is, or None where no module puts it out),
# in the order in which a block computes them
KINDS: dict[str, tuple[str, str | None]] = {
    "resid_pre": ("hook_resid_pre", None),
    "ln1_scale": ("ln1.hook_scale", None),  # sqrt(mean(x²) + eps), what the norm divides by
    "ln1_normalized": ("ln1.hook_normalized", None),  # x / scale, before the gain, as in TransformerLens
    "q": ("attn.hook_q", "self_attn.q_proj"),  # before q/k norm and RoPE, as in TransformerLens
    "k": ("attn.hook_k", "self_attn.k_proj"),
    "v": ("attn.hook_v", "self_attn.v_proj"),
    "pattern": ("attn.hook_pattern", None),  # attention weights, [heads, seq, kv_seq]; made only if asked for
    "z": ("attn.hook_z", None),  # what the output projection reads, heads side by side
    "result": ("attn.hook_result", None),  # what each head adds, heads side by side; made only if asked for
    "attn_out": ("hook_attn_out", "self_attn"),
    "resid_mid": ("hook_resid_mid", None),
    "ln2_scale": ("ln2.hook_scale", None),
    "ln2_normalized": ("ln2.hook_normalized", None),
    "mlp_in": ("mlp.hook_in", "post_attention_layernorm"),  # the normalized input, gain included: transcoders read it
    "mlp_post": ("mlp.hook_post", None),  # silu(gate) · up
    "mlp_out": ("hook_mlp_out", "mlp"),
    "resid_post": ("hook_resid_post", ""),
}
OUTER: dict[str, tuple[str, str | None]] = {  # what no block holds; whole names, and the layer is 0
    "embed": ("hook_embed", "model.embed_tokens"),
    "final_scale": ("ln_final.hook_scale", None),
    "final_normalized": ("ln_final.hook_normalized", None),
}
FINAL_KINDS = ("final_scale", "final_normalized")
D_MODEL_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")
HEAD_KINDS = ("q", "k", "v", "z", "result")  # heads side by side
_SCALES = ("ln1_scale", "ln2_scale", "final_scale")
_TL_KINDS = {tl: kind for kind, (tl, _) in KINDS.items()} | {"mlp.hook_out": "mlp_out"}
_OUTER_KINDS = {name: kind for kind, names in OUTER.items() for name in names if name is not None}
_AFTER = 10**6  # deeper than any block
_ORDER = {kind: number for number, kind in enumerate(KINDS)}
_HF_KINDS = {hf: kind for kind, (_, hf) in KINDS.items() if hf is not None}


@functools.total_ordering
@dataclasses.dataclass(frozen=True)
class Site:
    """One place: the activation of `kind` in block `layer`; prints as TransformerLens spells it, sorts by depth.

    The layer of a kind that no block holds is 0.
    """

    layer: int
    kind: str

    def __str__(self) -> str:
        if self.kind in OUTER:
            return OUTER[self.kind][0]
        return f"blocks.{self.layer}.{KINDS[self.kind][0] if self.kind in KINDS else self.kind}"

    @classmethod
    def parse(cls, name: "str | Site", config: QwenConfig) -> "Site":
        """Reads `blocks.12.hook_resid_post` or `model.layers.12`; an unknown name raises and says which exist."""
        site = name if isinstance(name, Site) else cls.spelled(name)
        if site is None or (
            site not in OUTER_SITES and (site.kind not in KINDS or not 0 <= site.layer < config.layers)
        ):
            raise InputError(f"site {str(name)!r} does not exist; this model has {describe_sites(config)}")
        return site

    @classmethod
    def spelled(cls, name: str) -> "Site | None":
        """The site that a name spells in either way, of whatever model; None if it spells none."""
        if name in _OUTER_KINDS:
            return cls(0, _OUTER_KINDS[name])
        if match := re.fullmatch(r"blocks\.(\d{1,6})\.([\w.]+)", name):
            return cls(int(match[1]), _TL_KINDS[match[2]]) if match[2] in _TL_KINDS else None
        if match := re.fullmatch(r"model\.layers\.(\d{1,6})(?:\.([\w.]+))?", name):
            return cls(int(match[1]), _HF_KINDS[match[2] or ""]) if (match[2] or "") in _HF_KINDS else None
        return None

    @property
    def depth(self) -> tuple[int, int]:
        """When the model computes it: a change at one site reaches another only if that one's depth is greater."""
        if self.kind in OUTER:
            return (_AFTER if self.kind in FINAL_KINDS else -1), list(OUTER).index(self.kind)
        return self.layer, _ORDER[self.kind]

    def __lt__(self, other: "Site") -> bool:
        return self.depth < other.depth

    def width(self, config: QwenConfig) -> int:
        """Values per position; of a pattern, per position and key."""
        if self.kind in _SCALES:
            return 1
        if self.kind == "pattern":
            return config.heads
        if self.kind in HEAD_KINDS:
            return self.heads(config) * self.per_head(config)
        return config.d_ff if self.kind == "mlp_post" else config.d_model

    def shape(self, config: QwenConfig, seq: int) -> tuple[int, ...]:
        """Of the activation of one sequence."""
        return (config.heads, seq, seq) if self.kind == "pattern" else (seq, self.width(config))

    def heads(self, config: QwenConfig) -> int:
        """Heads side by side; 0 where there are none."""
        if self.kind in ("k", "v"):
            return config.kv_heads
        return config.heads if self.kind in HEAD_KINDS else 0

    def per_head(self, config: QwenConfig) -> int:
        """Values of one of the heads side by side."""
        return config.d_model if self.kind == "result" else config.d_head


OUTER_SITES = tuple(Site(0, kind) for kind in OUTER)


def describe_sites(config: QwenConfig) -> str:
    """One line that lists every site of a model in both spellings."""
    last = config.layers - 1
    tl = ", ".join(tl for tl, _ in KINDS.values())
    hf = ", ".join(f".{hf}" for _, hf in KINDS.values() if hf)
    outer = ", ".join(name for names in OUTER.values() for name in names if name)
    hugging = f"model.layers.0 … model.layers.{last} alone or with {{{hf}}}"
    return f"blocks.0 … blocks.{last} followed by .{{{tl}}}, or {hugging}, or {outer}"


@dataclasses.dataclass(frozen=True)
class Capture:
    """Which d_model-wide sites to keep while generating.

    `layers` is the common case, the residual stream after those blocks; `sites` names places one by one.
    """

    layers: Iterable[int] = ()
    sites: Iterable[str | Site] = ()
    positions: Literal["generated", "prompt", "all"] = "generated"  # generated: those whose logits chose a token
    dtype: jax.typing.DTypeLike | None = None  # of the buffer; None: the model's

    def resolve(self, config: QwenConfig) -> tuple[Site, ...]:
        """The sites in the order of the buffer; raises for unknown, repeated, or not d_model-wide ones."""
        names: list[str | Site] = [Site(layer, "resid_post") for layer in self.layers]
        if self.positions not in ("generated", "prompt", "all"):
            raise InputError(f"Capture.positions: found {self.positions!r}, expected 'generated', 'prompt' or 'all'")
        sites = tuple(Site.parse(name, config) for name in [*names, *self.sites])
        if not sites:
            raise InputError("Capture names no site; give layers=... or sites=..., or capture=None")
        for site in sites:
            if site.kind not in (*D_MODEL_KINDS, "embed"):
                raise InputError(
                    f"site '{site}' is {site.width(config)} wide; generate captures d_model-wide sites only "
                    f"({', '.join(D_MODEL_KINDS)}); use model.run_with_capture for the others"
                )
            if sites.count(site) > 1:
                raise InputError(f"site '{site}' is named more than once")
        return sites


# Called at every site while a forward pass is traced; what it returns goes on through the model. What it returns as it
# was, the same object, adds nothing to the program. `tap.asks`, if it has that, holds the sites that it wants: patterns
# and heads' results are made for no other tap.
Activation = Float[Array, "batch *shape"]
Tap = Callable[[Site, Activation], Activation]


def untouched(site: Site, value: Activation) -> Activation:
    """The tap that reads nothing and changes nothing."""
    return value


# The same for the parts of one block, which name the kind and leave layer and rounding to the block.
BlockTap = Callable[[str, Activation], Activation]


def unchanged(kind: str, value: Activation) -> Activation:
    """The block's tap that reads nothing and changes nothing."""
    return value


def asked(tap: Tap | BlockTap, place: Site | str) -> bool:
    """Whether a tap wants what is made only if somebody asks for it."""
    return place in getattr(tap, "asks", ())


class Recorder:
    """A tap that keeps the wanted sites' values, after `inner` has had them; lives inside one trace."""

    def __init__(self, wanted: Iterable[Site], inner: Tap = untouched):
        self.wanted = frozenset(wanted)
        self.asks = self.wanted | frozenset(getattr(inner, "asks", ()))
        self.inner = inner
        self.values: dict[Site, Activation] = {}

    def __call__(self, site: Site, value: Activation) -> Activation:
        value = self.inner(site, value)
        if site in self.wanted:
            self.values[site] = value
        return value
