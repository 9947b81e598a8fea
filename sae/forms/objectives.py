"""What each form minimizes: a sparse path for the top-k forms, where only one product is dense, and a dense one."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from sae.codes.sparse import SparseCode, choose, keep_largest, pair_dots, pair_rows, row_dots, to_dense, weighted_rows
from sae.forms import losses
from sae.forms.abstract import AbstractSAE
from sae.forms.models import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK


class Hyper(eqx.Module):
    """The numbers a sweep may vary without recompiling."""

    learning_rate: Float32[Array, "*members"]
    sparsity: Float32[Array, "*members"]  # weight of L1 (ReLU, Gated) or of L0 (JumpReLU)
    target_l0: Float32[Array, "*members"]  # JumpReLU: 0 weighs L0 itself, else the squared relative miss of each sample
    k: Float32[Array, "*members"]  # TopK, BatchTopK, Matryoshka: latents kept, at most the form's k
    aux: Float32[Array, "*members"]  # weight of the dead latents' loss
    bandwidth: Float32[Array, "*members"]  # JumpReLU: ε of the straight-through estimators


class Outcome(NamedTuple):
    """What a step learns besides its gradient."""

    loss: Float[Array, ""]
    error: Float[Array, ""]  # mean_b ‖y − ŷ‖²
    fired: Int[Array, " d_sae"]  # samples in which each latent is > 0
    smallest: Float[Array, ""]  # least value kept, 0 where none was


class Selection(NamedTuple):
    """The pairs (sample, latent) a batch keeps, chosen by a product that takes no gradient."""

    rows: Int[Array, " pairs"]
    columns: Int[Array, " pairs"]
    kept: Bool[Array, " pairs"]
    overflow: Bool[Array, ""]  # a sample may have needed more candidates than there were


TOP_K_FORMS = (TopK, BatchTopK, Matryoshka)


def select(module: AbstractSAE, x: Float[Array, "batch d_model"], hyper: Hyper, dtype, slots: int) -> Selection:
    """Which latents each sample keeps: `slots` candidates by one dense product in `dtype`, then the k of the rule."""
    indices, pre = choose(module.centre(x).astype(dtype), module.encoder.astype(dtype), module.b_enc, slots)
    batch = x.shape[0]
    if isinstance(module, TopK):
        kept = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.float32)[None] < hyper.k, indices.shape)
        rows = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), slots)
        return Selection(rows, indices.reshape(-1), kept.reshape(-1), jnp.array(False))
    kept = keep_largest(jax.nn.relu(pre), jnp.round(batch * hyper.k).astype(jnp.int32))
    kept = kept & (pre > 0)
    # a batch keeps no more than batch·k, so the sparse products run over no more; of each row the first ones are kept
    pairs = min(batch * getattr(module, "k", slots), indices.size)
    counts = jnp.sum(kept.astype(jnp.int32), axis=-1)
    # not kept[:, -1]: a slice of what top_k returns makes XLA sort whole rows
    overflow = jnp.any(counts == slots) if slots < module.d_sae else jnp.array(False)
    ends = jnp.cumsum(counts)
    place = jnp.arange(pairs, dtype=jnp.int32)
    rows = jnp.minimum(jnp.searchsorted(ends, place, side="right"), batch - 1).astype(jnp.int32)
    columns = indices[rows, jnp.clip(place - (ends - counts)[rows], 0, slots - 1)]
    return Selection(rows, columns, place < ends[-1], overflow)


def sparse_objective(
    module: AbstractSAE, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], chosen: Selection
) -> tuple[Float[Array, ""], tuple[Outcome, Float[Array, "batch d_out"]]]:
    """Reconstruction from the chosen latents, their values and gradients by rows alone."""
    rows, columns, batch = chosen.rows, chosen.columns, x.shape[0]
    equal = isinstance(module, TopK)
    # the gradient to b_dec through the encoder is Σ_j bias_bar_j · encoder_j: a vector, not a sparse product
    centred, bias = lax.stop_gradient(module.centre(x)), module.b_enc
    if module.apply_b_dec_to_input:
        moved = module.b_dec - lax.stop_gradient(module.b_dec)
        bias = bias - jnp.einsum("sd,d->s", lax.stop_gradient(module.encoder), moved)
    dots = row_dots(columns.reshape(batch, -1), centred, module.encoder).reshape(-1) if equal else None
    dots = pair_dots(rows, columns, centred, module.encoder) if dots is None else dots
    values = jnp.where(chosen.kept, jax.nn.relu(dots + bias[columns]), 0.0)

    def decode(values):
        if equal:
            shape = (batch, -1)
            return weighted_rows(columns.reshape(shape), values.reshape(shape), module.decoder)
        return pair_rows(rows, columns, values, module.decoder, batch)

    if isinstance(module, Matryoshka):
        parts, start = [], 0
        for width in module.widths:
            parts.append(decode(jnp.where((columns >= start) & (columns < width), values, 0.0)))
            start = width
        loss, y_hat = losses.prefixes(y, parts, module.b_dec)
    else:
        y_hat = decode(values) + module.b_dec[None]
        loss = losses.squared_error(y, y_hat)
    fired = jnp.zeros(module.d_sae, jnp.int32).at[columns].add((values > 0).astype(jnp.int32))
    return loss, (_outcome(loss, y, y_hat, fired, values), y - y_hat)


def dense_objective(
    module: AbstractSAE, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], hyper: Hyper, dtype
) -> tuple[Float[Array, ""], tuple[Outcome, Float[Array, "batch d_out"]]]:
    """The form's loss with all latents in hand."""
    pre = product(module.centre(x), module.encoder, dtype) + module.b_enc[None]
    penalty = jnp.float32(0)
    if isinstance(module, JumpReLU):
        z = losses.jump_relu(pre, module.threshold, hyper.bandwidth)
        active = jnp.sum(losses.heaviside(pre, module.threshold, hyper.bandwidth), axis=-1)
        miss = losses.target_l0(active, jnp.where(hyper.target_l0 > 0, hyper.target_l0, 1.0))
        penalty = hyper.sparsity * jnp.where(hyper.target_l0 > 0, miss, jnp.mean(active))
    elif isinstance(module, Gated):
        z = module.activate(pre)
        penalty = hyper.sparsity * losses.l1(jax.nn.relu(pre), lax.stop_gradient(module.decoder))
        penalty = penalty + losses.gate_auxiliary(y, pre, module.decoder, module.b_dec)
    elif isinstance(module, ReLU):
        z = module.activate(pre)
        penalty = hyper.sparsity * losses.l1(z, module.decoder)
    elif isinstance(module, TopK):
        values, indices = lax.top_k(pre, module.k)
        values = jnp.where(jnp.arange(module.k, dtype=jnp.float32)[None] < hyper.k, jax.nn.relu(values), 0.0)
        z = to_dense(SparseCode(indices, values), module.d_sae)
    else:
        kept = keep_largest(jax.nn.relu(pre), jnp.round(x.shape[0] * hyper.k).astype(jnp.int32))
        z = jnp.where(kept, jax.nn.relu(pre), 0.0)
    if isinstance(module, Matryoshka):
        starts = (0, *module.widths[:-1])
        parts = [z[:, a:b] @ module.decoder[a:b] for a, b in zip(starts, module.widths, strict=True)]
        loss, y_hat = losses.prefixes(y, parts, module.b_dec)
    else:
        y_hat = product(z, module.decoder.T, dtype) + module.b_dec[None]
        loss = losses.squared_error(y, y_hat)
    fired = jnp.sum((z > 0).astype(jnp.int32), axis=0)
    return loss + penalty, (_outcome(loss + penalty, y, y_hat, fired, z), y - y_hat)


def aux_objective(
    module: AbstractSAE,
    x: Float[Array, "batch d_model"],
    residual: Float[Array, "batch d_out"],
    since_fired: Int[Array, " d_sae"],
    dead_after: int,
    k_aux: int,
) -> Float[Array, ""]:
    """AuxK over the 2·k_aux latents that have not fired for longest: all of the dead while they are no more."""
    silent, candidates = lax.top_k(since_fired, min(2 * k_aux, module.d_sae))
    pre = jnp.einsum("bd,sd->bs", module.centre(x), module.encoder[candidates]) + module.b_enc[candidates][None]
    return losses.auxk(residual, pre, silent >= dead_after, module.decoder[candidates], k_aux)


def product(x: Float[Array, "batch inner"], w: Float[Array, "outer inner"], dtype) -> Float[Array, "batch outer"]:
    """x · wᵀ with operands rounded to `dtype`, forward and backward, and float32 sums."""
    return x @ w.T if dtype == jnp.float32 else _rounded_product(dtype)(x, w)


def _rounded_product(dtype):
    def dot(a, b, axes):
        # rounding as a step of its own: fused into the operand it would leave the fast product on CPU
        a, b = lax.optimization_barrier((a.astype(dtype), b.astype(dtype)))
        return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)

    @jax.custom_vjp
    def rounded(x, w):
        return dot(x, w, ((1,), (1,)))

    def backward(residuals, out_bar):
        x, w = residuals
        return dot(out_bar, w, ((1,), (0,))), dot(out_bar, x, ((0,), (0,)))

    rounded.defvjp(lambda x, w: (rounded(x, w), (x, w)), backward)
    return rounded


def _outcome(loss: Array, y: Array, y_hat: Array, fired: Array, values: Array) -> Outcome:
    smallest = jnp.min(jnp.where(values > 0, values, jnp.inf))
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 0.0)
    return Outcome(loss, losses.squared_error(y, y_hat), fired, smallest)
