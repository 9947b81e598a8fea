"""JumpReLU: a threshold of its own for every latent, learned by straight-through estimators."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from sae.errors import InputError
from sae.forms import losses
from sae.forms.abstract import AbstractSAE, initial
from sae.forms.objective import Hyper, Objective, Taken, count_fired, product


def slower_in_long_runs(length: Float[Array, "..."]) -> Float[Array, "..."]:
    """1/s², at least 1/4s, at most 1, where s = steps · learning rate.

    Thresholds have to rise from almost 0 to what the target asks for; fast ones go on rising from there, and latents
    split into several that fire only when strong. Found on SynthSAEBench for s of 1 to 4 (docs/LOG.md), not derived.
    """
    return jnp.minimum(1.0, jnp.maximum(1.0 / jnp.square(length), 0.25 / length))


_GAIN = 10.0  # of the penalty's aim, over the relative miss
_RATE = 0.01  # of the common factor of thresholds, per step at a miss of 1
_DOWN = 10.0  # times that where too few fire
_ROWS = 4096  # at once, where thresholds are set by rows
_FALL = 0.7  # the part of the run over which the L0 that is aimed at falls to the target


class JumpReLU(AbstractSAE):
    """z = π · 1[π > threshold], threshold ≥ 0 per latent, learned straight through (Rajamanoharan et al. 2024b, §3)."""

    encoder: Float[Array, "d_sae d_model"]
    b_enc: Float[Array, " d_sae"]
    decoder: Float[Array, "d_sae d_out"]
    b_dec: Float[Array, " d_out"]
    threshold: Float[Array, " d_sae"]
    apply_b_dec_to_input: bool = eqx.field(static=True, default=True)
    name: ClassVar[str] = "jumprelu"
    in_latent_units: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    free_norm: ClassVar[bool] = True
    # the loss is the same at any length, and stays with its own units: its estimators see a threshold alone, while a
    # change of length moves π and threshold alike
    unit_in_loss: ClassVar[bool] = False
    b2: ClassVar[float] = 0.99  # thresholds: their gradients shrink a hundredfold as latents fall silent
    bias_rate: ClassVar = staticmethod(slower_in_long_runs)
    targets_l0: ClassVar[bool] = True

    @classmethod
    def init(
        cls, *, d_model: int, d_sae: int, key: PRNGKeyArray, threshold: float | None = None, d_out: int | None = None
    ) -> "JumpReLU":
        """`threshold`: of every latent; by default half a standard deviation of π on random inputs of length 1."""
        parts = initial(d_model, d_sae, d_out, key, 0.01)
        start = 0.005 / d_model**0.5 if threshold is None else threshold
        if not 0 <= start < float("inf"):
            raise InputError(f"threshold: found {threshold}, expected a finite number of at least 0")
        return cls(**parts, threshold=jnp.full((d_sae,), start, jnp.float32))

    def activate(self, pre: Float[Array, "*batch d_sae"]) -> Float[Array, "*batch d_sae"]:
        return jnp.where(pre > jnp.expand_dims(self.threshold, range(pre.ndim - 1)), jax.nn.relu(pre), 0.0)

    def loss(
        self, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], hyper: Hyper, dtype: Any
    ) -> Objective:
        """mean_b ‖y − ŷ‖² + sparsity · (the squared relative miss of target_l0, or L0 itself without one)."""
        pre = product(self.centre(x), self.encoder, dtype) + self.b_enc[None]
        z = jump_relu(pre, self.threshold, hyper.bandwidth)
        active = jnp.sum(heaviside(pre, self.threshold, hyper.bandwidth), axis=-1)
        miss = target_l0(active, _aim(jnp.mean(active), jnp.where(hyper.target_l0 > 0, hyper.target_l0, 1.0)))
        penalty = hyper.sparsity * jnp.where(hyper.target_l0 > 0, miss, jnp.mean(active))
        y_hat = product(z, self.decoder.T, dtype) + self.b_dec[None]
        return Objective.of(losses.squared_error(y, y_hat) + penalty, y, y_hat, count_fired(z), z)

    def settled(self, objective: Objective, taken: Taken) -> "JumpReLU":
        """Thresholds of at least 0, and where an L0 is asked for, steered to it by common factors.

        The penalty's gradient shapes single thresholds, but balances against the reconstruction short of the target.
        While more fire than should by now, all thresholds rise by as much; while fewer do, they fall, those of the
        latents that fire most often first. What should fire by now falls from all latents to the target over the first
        part of the run: thresholds that jump at once silence latents before they have learned what to read.
        """
        threshold, asked = jax.nn.relu(self.threshold), taken.hyper.target_l0
        wanted = jnp.where(asked > 0, asked, 1.0)
        by_now = wanted * (self.d_sae / wanted) ** jnp.maximum(0.0, 1.0 - taken.progress / _FALL)
        over, under = jnp.clip(objective.l0 / by_now - 1.0, 0.0, 1.0), jnp.clip(1.0 - objective.l0 / wanted, 0.0, 1.0)
        fired = objective.fired.astype(jnp.float32)
        often = fired / jnp.maximum(jnp.sum(jnp.square(fired)) / jnp.maximum(jnp.sum(fired), 1.0), 1.0)
        often = jnp.where(jnp.any(fired > 0), often, 1.0)  # where none fires all thresholds fall
        factor = jnp.exp(_RATE * (over - _DOWN * under * often))
        steered = jnp.where((asked > 0) & taken.good, threshold * factor, threshold)
        return eqx.tree_at(lambda m: m.threshold, self, steered)

    def at_l0(self, x: Float[Array, "rows d_model"], l0: float) -> "JumpReLU":
        """All thresholds times one factor, from 1/16 to 16, so that on these rows `l0` latents fire on average.

        Thresholds are trained on rows that the latents were trained on too; on others more fire. So this wants others.
        """
        if not len(x) or not 0 < l0 <= self.d_sae:
            raise InputError(f"at_l0: found {len(x)} rows, l0={l0}, expected rows and above 0 to {self.d_sae} latents")
        low, high = -jnp.log(16.0), jnp.log(16.0)
        for _ in range(24):  # the factor to a millionth
            middle = (low + high) / 2
            fired = sum(_fired(self, x[at : at + _ROWS], jnp.exp(middle)) for at in range(0, len(x), _ROWS))
            low, high = (middle, high) if float(fired) > l0 * len(x) else (low, middle)
        return eqx.tree_at(lambda m: m.threshold, self, self.threshold * jnp.exp(high))


@eqx.filter_jit
def _fired(module: JumpReLU, x: Float[Array, "rows d_model"], factor: Float[Array, ""]) -> Float[Array, ""]:
    pre = module.preactivations(x.astype(jnp.float32))
    return jnp.sum((pre > factor * module.threshold[None]) & (pre > 0), dtype=jnp.float32)


def _aim(active: Float[Array, ""], target: Float[Array, ""]) -> Float[Array, ""]:
    """What the penalty aims at: the target, moved the other way by ten times the batch's relative miss, e at most."""
    miss = jnp.clip(1.0 - lax.stop_gradient(active) / target, -1.0 / _GAIN, 1.0 / _GAIN)
    return target * jnp.exp(_GAIN * miss)


def target_l0(active: Float[Array, " batch"], target: Float[Array, ""]) -> Float[Array, ""]:
    """mean_b (L0_b / target − 1)² (Rajamanoharan et al. 2024b, Appendix on a target sparsity)."""
    return jnp.mean(jnp.square(active / target - 1.0))


@jax.custom_vjp
def heaviside(
    pre: Float[Array, "batch d_sae"], threshold: Float[Array, " d_sae"], bandwidth: Float[Array, ""]
) -> Float[Array, "batch d_sae"]:
    """H(π − θ), whose pseudo-derivative is −K((π − θ)/ε)/ε in θ and 0 in π, K = 1 on (−½, ½) (same paper, eq. 12)."""
    return (pre > threshold[None]).astype(pre.dtype)


def _heaviside_forward(pre, threshold, bandwidth):
    return heaviside(pre, threshold, bandwidth), (pre, threshold, bandwidth)


def _heaviside_backward(residuals, out_bar):
    pre, threshold, bandwidth = residuals
    threshold_bar = -jnp.sum(_kernel(pre, threshold, bandwidth) * out_bar, axis=0) / bandwidth
    return jnp.zeros_like(pre), threshold_bar, jnp.zeros_like(bandwidth)


heaviside.defvjp(_heaviside_forward, _heaviside_backward)


@jax.custom_vjp
def jump_relu(
    pre: Float[Array, "batch d_sae"], threshold: Float[Array, " d_sae"], bandwidth: Float[Array, ""]
) -> Float[Array, "batch d_sae"]:
    """π · H(π − θ), whose pseudo-derivative is −(θ/ε) K((π − θ)/ε) in θ and H(π − θ) in π (same paper, eq. 11)."""
    return jnp.where(pre > threshold[None], jax.nn.relu(pre), 0.0)


def _jump_relu_forward(pre, threshold, bandwidth):
    return jump_relu(pre, threshold, bandwidth), (pre, threshold, bandwidth)


def _jump_relu_backward(residuals, out_bar):
    pre, threshold, bandwidth = residuals
    threshold_bar = -jnp.sum(_kernel(pre, threshold, bandwidth) * out_bar, axis=0) * threshold / bandwidth
    fired = (pre > threshold[None]) & (pre > 0)
    return jnp.where(fired, out_bar, 0.0), threshold_bar, jnp.zeros_like(bandwidth)


jump_relu.defvjp(_jump_relu_forward, _jump_relu_backward)


def _kernel(pre: Array, threshold: Array, bandwidth: Array) -> Array:
    return (jnp.abs(pre - threshold[None]) < bandwidth / 2).astype(pre.dtype)
