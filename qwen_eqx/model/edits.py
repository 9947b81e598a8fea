"""Interventions as values: what to do to the activation at a site, and at which positions, inside the compiled loop."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

from qwen_eqx.errors import InputError
from qwen_eqx.model.config import QwenConfig
from qwen_eqx.model.sites import HEAD_KINDS, KINDS, Site

_NOWHERE = np.iinfo(np.int32).max
Activation = Float[Array, "batch seq width"]
Where = Literal["all", "prompt", "generated"] | Int[Array | np.ndarray, "*rows chosen"]
# prompt: every position of the prompt. generated: the positions whose logits choose a generated token, so from the last
# prompt position on (the positions that a capture of generated tokens holds). An array: these positions of every row, or
# of each row its own; −1 is the last position of the row's prompt, as Python counts.


def _where(value: Any) -> Any:
    return np.asarray(value, np.int32) if isinstance(value, list | tuple) and value else value


def _indices(value: Any) -> Any:
    return np.asarray(value, np.int32) if isinstance(value, int | np.integer | list | tuple) else value


class AbstractEdit(eqx.Module):
    """One change at one site, or at heads or neurons of it. Fields that are arrays may change without a new compilation."""

    site: eqx.AbstractVar[str | Site]
    where: eqx.AbstractVar[Where]
    head: Int[Array | np.ndarray, "*heads"] | None = eqx.field(default=None, kw_only=True, converter=_indices)
    """One head, or several side by side, of hook_q, hook_k, hook_v, hook_z or hook_result: the edit meets its values."""
    neuron: Int[Array | np.ndarray, "*neurons"] | None = eqx.field(default=None, kw_only=True, converter=_indices)
    """One neuron, or several, of mlp.hook_post: the edit meets one value of each."""

    @abstractmethod
    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        """What the activation becomes where the edit applies."""

    @abstractmethod
    def check(self, site: Site, config: QwenConfig) -> None:
        """Raises `InputError` if the edit's arrays do not fit the site."""

    def columns(self, per_head: int) -> Int[Array, " columns"] | None:
        """Which values of the site the edit meets; None: all of them."""
        if self.head is not None:
            inside = jnp.arange(per_head, dtype=jnp.int32)[None, :]
            return (jnp.atleast_1d(jnp.asarray(self.head))[:, None] * per_head + inside).reshape(-1)
        return None if self.neuron is None else jnp.atleast_1d(jnp.asarray(self.neuron))

    def width(self, site: Site, config: QwenConfig) -> int:
        """How many values of the site the edit meets."""
        if self.head is not None:
            return self.head.size * site.per_head(config)
        return site.width(config) if self.neuron is None else self.neuron.size

    @property
    def rows(self) -> dict[str, int | None]:
        """For how many rows each field that may differ by row has values; None: the same for all."""
        return {"where": None if isinstance(self.where, str) else _rows(self.where, 1)}


class Steer(AbstractEdit):
    """x' = x + scale · direction (activation addition, arXiv 2308.10248); one direction, or one for each row."""

    direction: Float[Array, "*rows width"]
    scale: Float[Array, ""] = eqx.field(converter=lambda value: jnp.asarray(value, jnp.float32), default=1.0)
    site: str | Site = eqx.field(static=True, kw_only=True)
    where: Where = eqx.field(default="all", kw_only=True, converter=_where)

    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        step = self.scale * _by_row(self.direction, x.shape[0], 1).astype(jnp.float32)
        return (x.astype(jnp.float32) + step[:, None, :]).astype(x.dtype)

    def check(self, site: Site, config: QwenConfig) -> None:
        _check_width(self, "direction", site, config)

    @property
    def rows(self) -> dict[str, int | None]:
        return {"direction": _rows(self.direction, 1)} | super().rows


class Ablate(AbstractEdit):
    """x' = x − (x · d̂) d̂ for a direction d, or one for each row (arXiv 2406.11717), or x' = 0 without one."""

    direction: Float[Array, "*rows width"] | None = None
    site: str | Site = eqx.field(static=True, kw_only=True)
    where: Where = eqx.field(default="all", kw_only=True, converter=_where)

    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        if self.direction is None:
            return jnp.zeros_like(x)
        unit = _by_row(self.direction, x.shape[0], 1).astype(jnp.float32)
        unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        wide = x.astype(jnp.float32)
        along = jnp.einsum("bsw,bw->bs", wide, jnp.broadcast_to(unit, (x.shape[0], x.shape[2])))
        return (wide - along[:, :, None] * unit[:, None, :]).astype(x.dtype)

    def check(self, site: Site, config: QwenConfig) -> None:
        if self.direction is not None:
            _check_width(self, "direction", site, config)

    @property
    def rows(self) -> dict[str, int | None]:
        return {"direction": None if self.direction is None else _rows(self.direction, 1)} | super().rows


class Patch(AbstractEdit):
    """x'[p_i] = values[i] at positions p_i (activation patching, arXiv 2309.16042); other positions stay as they are.

    Values, positions or both may be one set for all rows or one for each.
    """

    values: Float[Array, "*rows chosen width"]
    where: Where = eqx.field(converter=_where)  # the positions, as an array
    site: str | Site = eqx.field(static=True, kw_only=True)

    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        assert not isinstance(self.where, str)
        batch = x.shape[0]
        where = _by_row(jnp.asarray(self.where), batch, 1)
        chosen = jnp.argmax(positions[:, :, None] == where[:, None, :], axis=-1)
        values = jnp.broadcast_to(_by_row(self.values, batch, 2), (batch, *self.values.shape[-2:]))
        return jnp.take_along_axis(values, chosen[:, :, None], axis=1).astype(x.dtype)

    def check(self, site: Site, config: QwenConfig) -> None:
        _check_width(self, "values", site, config)
        if isinstance(self.where, str) or self.values.shape[-2] != self.where.shape[-1]:
            raise InputError(
                f"Patch.where: found {self.where!r}, expected {self.values.shape[-2]} positions, one a value"
            )

    @property
    def rows(self) -> dict[str, int | None]:
        return {"values": _rows(self.values, 2)} | super().rows


class Replace(AbstractEdit):
    """x' = f(x), or with `error_of` = g the error term kept: x' = f(x) + (x − g(x)), which is x exactly where f = g.

    f and g map an activation to one of the same shape: an SAE is f, an SAE with a latent clamped is f beside the plain g.
    """

    function: Callable[[Activation], Activation]
    error_of: Callable[[Activation], Activation] | None = None
    site: str | Site = eqx.field(static=True, kw_only=True)
    where: Where = eqx.field(default="all", kw_only=True, converter=_where)

    def edited(self, x: Activation, positions: Int[Array, "batch seq"]) -> Activation:
        wide = x.astype(jnp.float32)  # SAE parameters are float32
        new = self.function(wide).astype(jnp.float32)
        if self.error_of is not None:  # the difference first: it is exactly zero where nothing was changed
            new = wide + (new - self.error_of(wide).astype(jnp.float32))
        return new.astype(x.dtype)

    def check(self, site: Site, config: QwenConfig) -> None:
        return None


def _check_width(edit: AbstractEdit, field: str, site: Site, config: QwenConfig) -> None:
    found, wanted = getattr(edit, field).shape[-1], edit.width(site, config)
    if found != wanted:
        raise InputError(f"{type(edit).__name__}.{field}: found width {found}, expected {wanted} at site '{site}'")


def _check_part(edit: AbstractEdit, site: Site, config: QwenConfig) -> None:
    name = type(edit).__name__
    if edit.head is not None and edit.neuron is not None:
        raise InputError(f"{name}: found head and neuron, expected one of them")
    for field, kinds, count in (
        ("head", HEAD_KINDS, site.heads(config)),
        ("neuron", ("mlp_post",), config.d_ff),
    ):
        chosen = getattr(edit, field)
        if chosen is None:
            continue
        if site.kind not in kinds:
            having = ", ".join(KINDS[kind][0] for kind in kinds)
            raise InputError(f"{name}.{field}: found site '{site}', which has no {field}s, expected one of {having}")
        if chosen.ndim > 1 or chosen.size == 0 or not np.issubdtype(chosen.dtype, np.integer):
            raise InputError(f"{name}.{field}: found {chosen!r}, expected a whole number or a list of them")
        if isinstance(chosen, Tracer):
            continue
        listed = np.atleast_1d(np.asarray(chosen)).tolist()
        if wrong := [number for number in listed if not 0 <= number < count]:
            raise InputError(f"{name}.{field}: found {wrong[0]}, expected 0..{count - 1} at site '{site}'")
        if len(set(listed)) < len(listed):
            raise InputError(f"{name}.{field}: found {listed}, expected each number once")


def _rows(value: Shaped[Array | np.ndarray, "..."], dims: int) -> int | None:
    return None if value.ndim == dims else value.shape[0]


def _by_row(value: Shaped[Array, "*shape"], batch: int, dims: int) -> Shaped[Array, "rows ..."]:
    """`value` with a leading axis: 1 if all rows share it, else `batch`; the samples of one prompt stand together."""
    if value.ndim == dims:
        return value[None]
    return value if value.shape[0] == batch else jnp.repeat(value, batch // value.shape[0], axis=0)


def resolve_edits(
    edits: Sequence[AbstractEdit], config: QwenConfig, *, rows: int | None = None
) -> tuple[AbstractEdit, ...]:
    """The edits with their sites parsed and their arrays checked against the model and the number of prompts.

    `rows`: how many prompts there are; None where rows come and go, so that no edit may differ by row.
    """
    resolved = []
    for number, edit in enumerate(edits):
        if not isinstance(edit, AbstractEdit):
            raise InputError(f"edits: found {type(edit).__name__}, expected Steer, Ablate, Patch or Replace")
        site = Site.parse(edit.site, config)
        if site.kind == "pattern":
            raise InputError(f"edits[{number}]: found site '{site}', which can be read only, expected another")
        if isinstance(edit.where, str) and edit.where not in ("all", "prompt", "generated"):
            raise InputError(
                f"edits: where={edit.where!r}: expected 'all', 'prompt', 'generated' or an array of positions"
            )
        _check_part(edit, site, config)
        edit.check(site, config)
        for field, found in edit.rows.items():
            if found is not None and found != rows:
                wanted = "one for all" if rows is None else f"one for all or for each of {rows}"
                raise InputError(f"edits[{number}].{field}: found values for {found} rows, expected {wanted}")
        resolved.append(dataclasses.replace(edit, site=site))
    return tuple(resolved)


def check_positions(edits: Sequence[AbstractEdit], lengths: Int[np.ndarray, " batch"]) -> None:
    """Raises `InputError` for a position that a row does not have; positions that are traced are not looked at."""
    for number, edit in enumerate(edits):
        if isinstance(edit.where, str | Tracer):
            continue
        where = np.broadcast_to(np.asarray(edit.where), (len(lengths), edit.where.shape[-1]))
        beyond = (where >= lengths[:, None]) | (where < -lengths[:, None])
        if beyond.any():
            row, at = np.argwhere(beyond)[0]
            raise InputError(
                f"edits[{number}].where: found position {where[row, at]}, expected "
                f"one of {-lengths[row]}..{lengths[row] - 1}, which row {row} has"
            )


class EditTap:
    """A tap that applies the edits of each site in order, at the positions each one names."""

    def __init__(
        self,
        edits: Sequence[AbstractEdit],
        positions: Int[Array, "batch seq"],
        prompt_length: Int[Array, " batch"],
        config: QwenConfig,
    ):
        self.config = config
        self.edits = [_counted_from_start(edit, prompt_length) for edit in edits]
        self.asks = frozenset(edit.site for edit in self.edits)
        self.positions = positions
        self.prompt_length = prompt_length

    def __call__(self, site: Site, value: Float[Array, "batch *shape"]) -> Float[Array, "batch *shape"]:
        for edit in self.edits:
            if edit.site == site:
                columns = edit.columns(site.per_head(self.config))
                part = value if columns is None else value[:, :, columns]
                part = jnp.where(self._applies(edit.where)[:, :, None], edit.edited(part, self.positions), part)
                value = part if columns is None else value.at[:, :, columns].set(part)
        return value

    def _applies(self, where: Where) -> Bool[Array, "batch seq"]:
        here, prompt = self.positions, self.prompt_length[:, None]
        if not isinstance(where, str):
            return (here[:, :, None] == where[:, None, :]).any(-1)
        if where == "prompt":
            return (here >= 0) & (here < prompt)
        return here >= (prompt - 1 if where == "generated" else 0)


def _counted_from_start(edit: AbstractEdit, prompt_length: Int[Array, " batch"]) -> AbstractEdit:
    """The edit with positions for every row, and −1 as the last of the row's prompt."""
    if isinstance(edit.where, str):
        return edit
    where = _by_row(jnp.asarray(edit.where), prompt_length.shape[0], 1)
    from_end = where + prompt_length[:, None]
    # one further back than the row is long must not meet a pad, whose position is negative too
    return dataclasses.replace(edit, where=jnp.where(where < 0, jnp.where(from_end < 0, _NOWHERE, from_end), where))
