"""Matryoshka: a BatchTopK whose first latents alone reconstruct too, for several widths."""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sae.errors import InputError
from sae.forms import ksparse, losses
from sae.forms.abstract import AbstractSAE, initial
from sae.forms.ksparse import AbstractBatchTopK, check_k
from sae.forms.objective import Hyper, Objective, Selection, Taken, count_fired, product


def check_widths(widths: Any, d_sae: int) -> tuple[int, ...]:
    given = [width for width in widths if type(width) is int] if isinstance(widths, list | tuple) else []
    if not given or len(given) != len(widths) or given != sorted({*given, d_sae}) or given[0] < 1:
        raise InputError(f"widths: found {widths!r:.80}, expected rising sizes that end at d_sae={d_sae}")
    return tuple(given)


class Matryoshka(AbstractSAE, AbstractBatchTopK):
    """BatchTopK whose first m latents alone reconstruct too, for every m in widths (Bussmann et al. 2025, §3)."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    threshold: Float[Array, ""]
    k: int = eqx.field(static=True)
    widths: tuple[int, ...] = eqx.field(static=True)
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    name: ClassVar[str] = "matryoshka"
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    active_per_k: ClassVar[int | None] = 4
    details: ClassVar = {"k": check_k, "widths": check_widths}

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        d_sae: int,
        k: int,
        key: PRNGKeyArray,
        widths: tuple[int, ...] | None = None,
        d_out: int | None = None,
    ) -> "Matryoshka":
        """`widths` rise to d_sae; by default d_sae over 16, 8, 4, 2 and 1."""
        if widths is None:
            widths = tuple(sorted({max(1, d_sae // part) for part in (16, 8, 4, 2, 1)}))
        rules = {"k": check_k(k, d_sae), "widths": check_widths(widths, d_sae)}
        return cls(**initial(d_model, d_sae, d_out, key), threshold=ksparse.unknown_threshold(), **rules)

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return ksparse.over_threshold(pre, self.threshold, self.k)

    def loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_m mean_b ‖y − ŷ_m‖², ŷ_m from the first m latents of the batch·k largest."""
        z = ksparse.batch_code(product(self.centre(x), self.encoder, dtype) + self.b_enc[None], hyper)
        starts = (0, *self.widths[:-1])
        parts = [z[:, a:b] @ self.decoder[a:b] for a, b in zip(starts, self.widths, strict=True)]
        total, y_hat = prefixes(y, parts, self.b_dec)
        return Objective.of(total, y, y_hat, count_fired(z), z)

    def select(self, x: Float[Array, "batch d_model"], hyper: Hyper, dtype: Any, candidates: int) -> Selection:
        encoder = self.encoder.astype(dtype)
        return ksparse.batch_select(self.centre(x).astype(dtype), encoder, self.b_enc, (self.k, hyper.k), candidates)

    def sparse_loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], chosen: Selection
    ) -> Objective:
        values = ksparse.pair_values(self, self.centre(x), self.encoder, chosen)
        total, y_hat = prefixes(
            y, ksparse.pair_parts(self.widths, chosen, values, self.decoder, x.shape[0]), self.b_dec
        )
        return Objective.of(total, y, y_hat, ksparse.fired_pairs(chosen.columns, values, self.d_sae), values)

    def settled(self, objective: Objective, taken: Taken) -> "Matryoshka":
        threshold = ksparse.running_threshold(self.threshold, objective, taken)
        return eqx.tree_at(lambda m: m.threshold, self, threshold)


def prefixes(
    x: Float[Array, "batch d_out"], parts: Sequence[Float[Array, "batch d_out"]], b_dec: Float[Array, " d_out"]
) -> tuple[Float[Array, ""], Float[Array, "batch d_out"]]:
    """mean_m mean_b ‖x − x̂_m‖² with x̂_m = b_dec + Σ_{i≤m} parts_i, and the last x̂ (Bussmann et al. 2025, §3).

    parts_i is what the latents between the (i−1)th width and the ith write.
    """
    x_hat, loss = jnp.broadcast_to(b_dec[None], x.shape), jnp.float32(0)
    for part in parts:
        x_hat = x_hat + part
        loss = loss + losses.squared_error(x, x_hat)
    return loss / len(parts), x_hat
