"""Interventions as values: what to do to the activation at a site, and at which positions, inside the compiled loop."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qwen_eqx.errors import InputError
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.sites import Site

Activation = Float[Array, "batch seq width"]
Where = Literal["all", "prompt", "generated"] | Int[Array, " chosen"]
# prompt: every position of the prompt. generated: the positions whose logits choose a generated token, so from the last
# prompt position on (the positions that a capture of generated tokens holds). An array: these positions.


class AbstractEdit(eqx.Module):
    """One change at one site. Fields that are arrays may change without a new compilation."""

    site: eqx.AbstractVar[str | Site]
    where: eqx.AbstractVar[Where]

    @abstractmethod
    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        """What the activation becomes where the edit applies."""

    @abstractmethod
    def check(self, site: Site, config: QwenConfig) -> None:
        """Raises `InputError` if the edit's arrays do not fit the site."""


class Steer(AbstractEdit):
    """x' = x + scale · direction (activation addition, arXiv 2308.10248)."""

    direction: Float[Array, " width"]
    scale: Float[Array, ""] = eqx.field(converter=lambda value: jnp.asarray(value, jnp.float32), default=1.0)
    site: str | Site = eqx.field(static=True, kw_only=True)
    where: Where = eqx.field(default="all", kw_only=True)

    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        step = self.scale * self.direction.astype(jnp.float32)
        return (x.astype(jnp.float32) + step[None, None, :]).astype(x.dtype)

    def check(self, site: Site, config: QwenConfig) -> None:
        _check_width("Steer.direction", self.direction, site, config)


class Ablate(AbstractEdit):
    """x' = x − (x · d̂) d̂ for a direction d (arXiv 2406.11717), or x' = 0 without one."""

    direction: Float[Array, " width"] | None = None
    site: str | Site = eqx.field(static=True, kw_only=True)
    where: Where = eqx.field(default="all", kw_only=True)

    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        if self.direction is None:
            return jnp.zeros_like(x)
        unit = self.direction.astype(jnp.float32)
        unit = unit / jnp.maximum(jnp.linalg.norm(unit), jnp.finfo(jnp.float32).tiny)
        wide = x.astype(jnp.float32)
        along = jnp.einsum("bsw,w->bs", wide, unit)
        return (wide - along[:, :, None] * unit[None, None, :]).astype(x.dtype)

    def check(self, site: Site, config: QwenConfig) -> None:
        if self.direction is not None:
            _check_width("Ablate.direction", self.direction, site, config)


class Patch(AbstractEdit):
    """x'[p_i] = values[i] at positions p_i (activation patching, arXiv 2309.16042); other positions stay as they are."""

    values: Float[Array, "chosen width"]
    where: Where  # the positions, as an array
    site: str | Site = eqx.field(static=True, kw_only=True)

    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        assert not isinstance(self.where, str)
        chosen = jnp.argmax(positions[:, :, None] == self.where[None, None, :], axis=-1)
        return self.values[chosen].astype(x.dtype)

    def check(self, site: Site, config: QwenConfig) -> None:
        _check_width("Patch.values", self.values, site, config)
        if isinstance(self.where, str) or self.values.shape[:1] != self.where.shape:
            raise InputError(
                f"Patch.where: found {self.where!r}, expected {self.values.shape[0]} positions, one a value"
            )


class Replace(AbstractEdit):
    """x' = f(x), or with `error_of` = g the error term kept: x' = f(x) + (x − g(x)), which is x exactly where f = g.

    f and g map an activation to one of the same shape: an SAE is f, an SAE with a latent clamped is f beside the plain g.
    """

    function: Callable[[Activation], Activation]
    error_of: Callable[[Activation], Activation] | None = None
    site: str | Site = eqx.field(static=True, kw_only=True)
    where: Where = eqx.field(default="all", kw_only=True)

    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        wide = x.astype(jnp.float32)  # SAE parameters are float32
        new = self.function(wide).astype(jnp.float32)
        if self.error_of is not None:  # the difference first: it is exactly zero where nothing was changed
            new = wide + (new - self.error_of(wide).astype(jnp.float32))
        return new.astype(x.dtype)

    def check(self, site: Site, config: QwenConfig) -> None:
        return None


def _check_width(name: str, value: Float[Array, "*rows width"], site: Site, config: QwenConfig) -> None:
    if value.shape[-1] != site.width(config):
        raise InputError(f"{name}: found width {value.shape[-1]}, expected {site.width(config)} at site '{site}'")


def resolve_edits(edits: Sequence[AbstractEdit], config: QwenConfig) -> tuple[AbstractEdit, ...]:
    """The edits with their sites parsed and their arrays checked against the model."""
    resolved = []
    for edit in edits:
        if not isinstance(edit, AbstractEdit):
            raise InputError(f"edits: found {type(edit).__name__}, expected Steer, Ablate, Patch or Replace")
        site = Site.parse(edit.site, config)
        if isinstance(edit.where, str) and edit.where not in ("all", "prompt", "generated"):
            raise InputError(
                f"edits: where={edit.where!r}: expected 'all', 'prompt', 'generated' or an array of positions"
            )
        edit.check(site, config)
        resolved.append(dataclasses.replace(edit, site=site))
    return tuple(resolved)


class EditTap:
    """A tap that applies the edits of each site in order, at the positions each one names."""

    def __init__(
        self, edits: Sequence[AbstractEdit], positions: Int[Array, "batch seq"], prompt_length: Int[Array, " batch"]
    ):
        self.edits = edits
        self.positions = positions
        self.prompt_length = prompt_length

    def __call__(self, site: Site, value: Activation) -> Activation:
        for edit in self.edits:
            if edit.site == site:
                applies = self._applies(edit.where)[:, :, None]
                value = jnp.where(applies, edit.edited(value, self.positions), value)
        return value

    def _applies(self, where: Where) -> Bool[Array, "batch seq"]:
        here, prompt = self.positions, self.prompt_length[:, None]
        if not isinstance(where, str):
            return (here[:, :, None] == where[None, None, :]).any(-1)
        if where == "prompt":
            return (here >= 0) & (here < prompt)
        return here >= (prompt - 1 if where == "generated" else 0)
