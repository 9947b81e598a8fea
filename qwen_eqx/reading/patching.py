"""Patching: activations of a clean prompt put into a corrupted one, every place of a kind in one compiled call."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from qwen_eqx.errors import InputError, positive
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.effect import Tokens
from qwen_eqx.model.qwen import Qwen
from qwen_eqx.model.sites import HEAD_KINDS, KINDS, Activation, Recorder, Site, Tap, untouched
from qwen_eqx.reading.gradients import Loss, Which, check_which, grad_at, one_prompt, table_of
from qwen_eqx.reading.labelled import Labelled

AT_ONCE = 16  # runs side by side in memory
Values = dict[Site, Float[Array, "1 seq _"]]
Metrics = tuple[Float32[Array, "chunks at_once"], Float32[Array, ""]]  # of every patch, and of the clean run


@dataclasses.dataclass(frozen=True)
class Places:
    """The places that are patched one at a time: a kind of site in some blocks, by position, by head, or by both."""

    kind: str = "resid_pre"
    by: Literal["position", "head", "head and position"] = "position"
    layers: Sequence[int] | None = None  # None: all blocks


@dataclasses.dataclass(frozen=True)
class Patched:
    """What each patch does to the metric."""

    change: Labelled  # metric(corrupted, patched) − metric(corrupted), by layer and position, head, or both
    clean: float  # metric(clean)
    corrupted: float  # metric(corrupted)

    @property
    def recovered(self) -> Labelled:
        """change / (clean − corrupted): 1 where the patch alone brings the clean metric back."""
        return Labelled(self.change.values / (self.clean - self.corrupted), self.change.labels)


def patch_effects(
    model: Qwen,
    clean: Tokens,
    corrupted: Tokens,
    metric: Loss,
    places: Places = Places(),
    *,
    logits: Which = "last",
    at_once: int = AT_ONCE,
) -> Patched:
    """The metric with one activation at a time taken from the clean run (arXiv 2309.16042): what a loop of `Patch` gives.

    Prompts of one length; swap them to damage instead of repair. `metric` meets the last position's logits, or with
    `logits="all"` all. `at_once` runs stand side by side in memory. Compiled once a length, kind and metric: pass the same
    function again, not a new lambda.
    """
    runs = Runs.of(model, clean, corrupted, metric, logits)
    listed = Listed.of(model.config, places, runs.seq)
    return listed.labelled(_patched(runs, listed.chunks(at_once), listed.sites))


def attribution_patch(
    model: Qwen,
    clean: Tokens,
    corrupted: Tokens,
    metric: Loss,
    places: Places = Places(),
    *,
    logits: Which = "last",
) -> Patched:
    """change ≈ ∂metric/∂x · (x_clean − x_corrupted), x of the corrupted run (Nanda 2023; arXiv 2310.10348).

    Two passes and one gradient stand for all patches; beside `patch_effects` one sees where they part.
    """
    runs = Runs.of(model, clean, corrupted, metric, logits)
    listed = Listed.of(model.config, places, runs.seq)
    _, grads = grad_at(model, corrupted, listed.sites, metric, logits=logits)
    differences, before, after = _differences(runs, listed.sites)
    each = [np.asarray(grads[site] * differences[site][0]) for site in listed.sites]
    return listed.summed(np.stack(each), before, after)


class Runs(eqx.Module):
    """A clean and a corrupted prompt of one length, and what is measured of a run."""

    model: Qwen
    clean: Int[Array, "1 seq"]
    corrupted: Int[Array, "1 seq"]
    metric: Loss
    logits: Which = eqx.field(static=True)

    @classmethod
    def of(cls, model: Qwen, clean: Tokens, corrupted: Tokens, metric: Loss, logits: Which) -> "Runs":
        """Raises `InputError` for prompts of two lengths."""
        check_which(logits)
        pair = one_prompt(model, clean, "clean"), one_prompt(model, corrupted, "corrupted")
        found = pair[0].shape[1], pair[1].shape[1]
        if found[0] != found[1]:
            raise InputError(f"clean, corrupted: found {found[0]} and {found[1]} tokens, expected as many in both")
        return cls(model, *pair, metric, logits)

    @property
    def seq(self) -> int:
        return self.clean.shape[1]

    def recorded(
        self, tokens: Int[Array, "1 seq"], sites: Iterable[Site] = (), tap: Tap = untouched
    ) -> tuple[Values, Float32[Array, ""]]:
        """What stands at these sites in a run with `tap`, and the run's metric."""
        recorder = Recorder(sites, tap)
        value = self.metric(table_of(self.model, tokens, recorder, self.logits))
        return recorder.values, jnp.asarray(value, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Listed:
    """The places of a model and a length, as rows (layer, head, position); −1: all heads, all positions."""

    sites: tuple[Site, ...]
    labels: dict[str, tuple[int, ...]]
    heads: int  # side by side at each site

    @classmethod
    def of(cls, config: QwenConfig, places: Places, seq: int) -> "Listed":
        """Raises `InputError` for kinds that cannot be patched, or not so, and for blocks that do not exist."""
        kind, by = places.kind, places.by
        if kind not in KINDS or kind == "pattern":
            kinds = ", ".join(each for each in KINDS if each != "pattern")
            raise InputError(f"Places.kind: found {kind!r}, expected one of {kinds}")
        if by not in ("position", "head", "head and position"):
            raise InputError(f"Places.by: found {by!r}, expected 'position', 'head' or 'head and position'")
        if "head" in by and kind not in HEAD_KINDS:
            raise InputError(f"Places.kind: found {kind!r}, without heads, expected one of {', '.join(HEAD_KINDS)}")
        numbers = tuple(range(config.layers) if places.layers is None else places.layers)
        sites = tuple(Site.parse(Site(layer, kind), config) for layer in numbers)
        if not sites or len(set(sites)) < len(sites):
            raise InputError(f"Places.layers: found {list(numbers)}, expected at least one, each once")
        axes = {"head": range(sites[0].heads(config)), "position": range(seq)}
        labels = {"layer": numbers, **{axis: tuple(each) for axis, each in axes.items() if axis in by}}
        return cls(sites, labels, sites[0].heads(config))

    @property
    def rows(self) -> Int[np.ndarray, "patches 3"]:
        """(layer, head, position) of each patch, in the order of the labels."""
        axes = [np.asarray(self.labels.get(axis, (-1,)), np.int32) for axis in ("layer", "head", "position")]
        return np.stack([axis.reshape(-1) for axis in np.meshgrid(*axes, indexing="ij")], axis=1)

    def chunks(self, at_once: int) -> Int[Array, "chunks at_once 3"]:
        """The rows in equal chunks, and at least one row after them that patches nothing: the corrupted run."""
        positive("at_once", at_once)
        rows = len(self.rows) + 1
        count = -(-rows // at_once)
        size = -(-rows // count)
        padded = np.pad(self.rows, ((0, count * size - len(self.rows)), (0, 0)), constant_values=-1)
        return jnp.asarray(padded.reshape(count, size, 3))

    def labelled(self, found: Metrics) -> Patched:
        """The metrics of all rows as what each patch changes."""
        metrics, clean = (np.asarray(part).reshape(-1) for part in found)
        corrupted = metrics[len(self.rows)]
        change = metrics[: len(self.rows)] - corrupted
        shape = tuple(map(len, self.labels.values()))
        return Patched(Labelled(change.reshape(shape), self.labels), float(clean[0]), float(corrupted))

    def summed(
        self, values: Float[np.ndarray, "layers seq width"], clean: Float32[Array, ""], corrupted: Float32[Array, ""]
    ) -> Patched:
        """Of what every single value changes, the sum over each place."""
        apart = values.reshape(*values.shape[:2], max(1, self.heads), -1).sum(axis=-1).swapaxes(1, 2)
        gone = tuple(axis for axis, name in enumerate(("head", "position"), 1) if name not in self.labels)
        return Patched(Labelled(apart.sum(axis=gone), self.labels), float(clean), float(corrupted))


class Put:
    """A tap that puts a clean activation in at one place, after holding the sites of `held` at those values."""

    def __init__(self, place: Int[Array, "3"], clean: Values, heads: int, held: Values):
        self.place, self.clean, self.heads, self.held = place, clean, heads, held
        self.asks = frozenset(clean) | frozenset(held)

    def __call__(self, site: Site, value: Activation) -> Activation:
        value = self.held.get(site, value)
        if site not in self.clean:
            return value
        layer, head, position = self.place
        seq, width = value.shape[1:]
        at = (position < 0) | (jnp.arange(seq, dtype=jnp.int32) == position)
        of = (head < 0) | (jnp.arange(width, dtype=jnp.int32) // (width // max(1, self.heads)) == head)
        here = (layer == site.layer) & at[None, :, None] & of[None, None, :]
        return jnp.where(here, self.clean[site], value)


@eqx.filter_jit
def _patched(runs: Runs, rows: Int[Array, "chunks at_once 3"], sites: tuple[Site, ...]) -> Metrics:
    clean, before = runs.recorded(runs.clean, sites)
    heads = sites[0].heads(runs.model.config)

    def metric(row: Int[Array, "3"]) -> Float32[Array, ""]:
        return runs.recorded(runs.corrupted, tap=Put(row, clean, heads, {}))[1]

    return jax.lax.map(jax.vmap(metric), rows), before


@eqx.filter_jit
def _differences(runs: Runs, sites: tuple[Site, ...]) -> tuple[Values, Float32[Array, ""], Float32[Array, ""]]:
    clean, before = runs.recorded(runs.clean, sites)
    own, after = runs.recorded(runs.corrupted, sites)
    return {site: clean[site].astype(jnp.float32) - own[site].astype(jnp.float32) for site in sites}, before, after
