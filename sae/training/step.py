"""One training step of one member: loss, gradient, Adam, and what the form keeps true of its parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from sae.forms import objectives
from sae.forms.abstract import AbstractSAE
from sae.forms.models import BatchTopK, JumpReLU, Matryoshka, TopK
from sae.forms.objectives import Hyper, Outcome
from sae.training.state import Metrics, TrainConfig, TrainState


def step(
    state: TrainState, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"], config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """The next state, and metrics of the batch; `train.run` compiles many of these into one call."""
    module = state.module
    x = (x.astype(jnp.float32) - state.mean[None]) * state.scale
    y = (y.astype(jnp.float32) - state.mean_out[None]) * state.scale_out
    warm = jnp.minimum(1.0, (state.step + 1).astype(jnp.float32) / max(1, config.sparsity_warmup_steps))
    numbers = eqx.tree_at(lambda h: h.sparsity, state.hyper, state.hyper.sparsity * warm)
    outcome, gradient = _gradient(module, x, y, numbers, state.since_fired, config)

    finite = jnp.isfinite(outcome.loss) & jnp.all(jnp.isfinite(gradient.b_dec)) & jnp.all(jnp.isfinite(gradient.b_enc))
    good = finite & (state.bad_step < 0)
    module, optimizer = _update(state, gradient, good, config)
    if isinstance(state.module, BatchTopK | Matryoshka):
        known = state.module.threshold
        threshold = _running_threshold(known, outcome.smallest, config.threshold_decay)
        module = eqx.tree_at(lambda m: m.threshold, module, jnp.where(good, threshold, known))

    since = jnp.where(outcome.fired > 0, 0, state.since_fired + x.shape[0])
    variance = jnp.mean(jnp.sum(jnp.square(y - jnp.mean(y, axis=0, keepdims=True)), axis=-1))
    metrics = Metrics(
        outcome.loss,
        jnp.where(variance > 0, outcome.error / jnp.where(variance > 0, variance, 1.0), 0.0),
        jnp.sum(outcome.fired).astype(jnp.float32) / x.shape[0],
        jnp.sum((since >= config.dead_after).astype(jnp.int32)),
    )
    new = TrainState(
        module=module,
        average=_average(state, module, config),
        optimizer=optimizer,
        hyper=state.hyper,
        step=state.step + good.astype(jnp.int32),
        since_fired=jnp.where(good, since, state.since_fired),
        scale=state.scale,
        mean=state.mean,
        scale_out=state.scale_out,
        mean_out=state.mean_out,
        bad_step=jnp.where(finite | (state.bad_step >= 0), state.bad_step, state.step),
    )
    return new, metrics


def _gradient(
    module: AbstractSAE,
    x: Float[Array, "batch d_model"],
    y: Float[Array, "batch d_out"],
    numbers: Hyper,
    since_fired: Int32[Array, " d_sae"],
    config: TrainConfig,
) -> tuple[Outcome, AbstractSAE]:
    """The gradient by the cheapest exact path: sparse; sparse with AuxK where latents are dead; dense.

    Free rows are a parametrization of unit ones, (‖d_j‖ e_j, d_j / ‖d_j‖): a latent turns at a rate inverse to its
    length, so short new ones turn fast and those that fire often settle. JumpReLU's loss is the same either way, and
    stays with its own units: a change of length moves π and threshold alike, its estimators see the threshold alone.
    """
    free = config.frees(module) and not isinstance(module, JumpReLU)
    dtype = jnp.dtype(config.product_dtype)
    k_aux = min(max(1, x.shape[-1] // 2) if config.k_aux is None else config.k_aux, module.d_sae)

    def evaluate(objective, aux: bool):
        def total(module):
            module = module.unit_rows() if free else module
            loss, (outcome, residual) = objective(module)
            if aux:
                extra = objectives.aux_objective(module, x, residual, since_fired, config.dead_after, k_aux)
                loss = loss + numbers.aux * extra
            return loss, outcome

        (loss, outcome), gradient = eqx.filter_value_and_grad(total, has_aux=True)(module)
        return outcome._replace(loss=loss), gradient

    def dense(module):
        return objectives.dense_objective(module, x, y, numbers, dtype)

    if not isinstance(module, objectives.TOP_K_FORMS):
        return evaluate(dense, False)
    slots = module.k if isinstance(module, TopK) else min(module.d_sae, config.slots * module.k)
    meant = module.unit_rows() if free else module
    chosen = lax.stop_gradient(objectives.select(meant, x, numbers, dtype, slots))

    def sparse(module):
        return objectives.sparse_objective(module, x, y, chosen)

    aux = k_aux > 0 and config.aux > 0
    paths = [lambda: evaluate(sparse, False)]
    which = jnp.int32(0)
    if aux:
        paths.append(lambda: evaluate(sparse, True))
        which = jnp.any(since_fired >= config.dead_after).astype(jnp.int32)
    if not isinstance(module, TopK):
        which = jnp.where(chosen.overflow, len(paths), which)
        paths.append(lambda: evaluate(dense, aux))
    return lax.switch(_shared(which), paths) if len(paths) > 1 else paths[0]()


@jax.custom_batching.custom_vmap
def _shared(which: Int32[Array, ""]) -> Int32[Array, ""]:
    """The path that all members of a vmap take: each is exact for all, and own ones would make them compute all three."""
    return which


@_shared.def_vmap
def _shared_by_members(_size, batched, which):
    return (jnp.max(which) if batched[0] else which), False


def _update(
    state: TrainState, gradient: AbstractSAE, good: Bool[Array, ""], config: TrainConfig
) -> tuple[AbstractSAE, optax.OptState]:
    """Adam; where the step is not good every leaf stays bit for bit, without another pass over memory."""
    module = state.module
    on_sphere = module.unit_norm and not config.frees(module)
    if on_sphere:  # the part along the decoder would only be undone by the normalization
        along = jnp.sum(gradient.decoder * module.decoder, axis=-1, keepdims=True)
        gradient = eqx.tree_at(lambda g: g.decoder, gradient, gradient.decoder - along * module.decoder)
    if config.clip_norm is not None:
        shrink = jnp.minimum(1.0, config.clip_norm / (optax.tree.norm(gradient) + 1e-6))
        gradient = jax.tree.map(lambda g: g * shrink, gradient)
    gradient = jax.tree.map(lambda g: jnp.where(good, g, 0.0), gradient)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
        direction, optimizer = adam(config, module).update(eqx.filter(gradient, eqx.is_array), state.optimizer)
    optimizer = jax.tree.map(lambda new, old: jnp.where(good, new, old), optimizer, state.optimizer)
    rate = jnp.where(good, state.hyper.learning_rate * _schedule(state.step, config), 0.0)
    rates = jax.tree.map(lambda _: rate * bias_rate(module, state.hyper, config), direction)
    rates = eqx.tree_at(lambda m: (m.encoder, m.decoder), rates, (rate, rate))
    module = jax.tree.map(lambda p, d, r: p - r * d, module, direction, rates)
    if on_sphere:
        norm = jnp.linalg.norm(module.decoder, axis=-1, keepdims=True)
        shrink = jnp.where(good, 1.0 / jnp.maximum(norm, 1e-12), 1.0)
        module = eqx.tree_at(lambda m: m.decoder, module, module.decoder * shrink)
    if isinstance(module, JumpReLU):
        module = eqx.tree_at(lambda m: m.threshold, module, jax.nn.relu(module.threshold))
    return module, optimizer


def adam(config: TrainConfig, module: AbstractSAE) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=module.b2 if config.b2 is None else config.b2, eps=config.eps)


def bias_rate(module: AbstractSAE, numbers: Hyper, config: TrainConfig) -> Float[Array, ""] | float:
    """How fast biases and thresholds move, over the matrices' learning rate.

    A JumpReLU's thresholds have to rise from almost 0 to what its target asks for; fast ones go on rising from there,
    and latents split into several that fire only when strong. So the ratio falls with s = steps · learning_rate: 1/s²,
    at least 1/4s, at most 1. Found on SynthSAEBench for s of 1 to 4 (docs/LOG.md), not derived.
    """
    if config.bias_rate is not None or not isinstance(module, JumpReLU):
        return 1.0 if config.bias_rate is None else config.bias_rate
    length = config.steps * numbers.learning_rate
    return jnp.minimum(1.0, jnp.maximum(1.0 / jnp.square(length), 0.25 / length))


def _schedule(step: Array, config: TrainConfig) -> Array:
    done = step.astype(jnp.float32)
    rise = (done + 1.0) / max(1, config.warmup_steps)
    fall = (config.steps - done) / max(1, config.decay_steps)
    return jnp.clip(jnp.minimum(rise, fall if config.decay_steps else 1.0), 0.0, 1.0)


def _running_threshold(threshold: Array, smallest: Array, decay: float) -> Array:
    return jnp.where(threshold < 0, smallest, decay * threshold + (1 - decay) * smallest)


def _average(state: TrainState, module: AbstractSAE, config: TrainConfig) -> AbstractSAE | None:
    if state.average is None or config.average_decay is None:
        return None
    done = state.step.astype(jnp.float32)
    decay = jnp.minimum(config.average_decay, (1.0 + done) / (10.0 + done))  # forget the start sooner
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, module)
