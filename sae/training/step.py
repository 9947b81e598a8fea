"""One training step of one member: loss, gradient, Adam, and what the form keeps true of its parameters."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from sae.forms import losses
from sae.forms.abstract import AbstractDictionary, row_lengths
from sae.forms.ksparse import AbstractKSparse
from sae.forms.objective import Hyper, Objective, Taken, flat
from sae.training.config import TrainConfig
from sae.training.state import StepMetrics, TrainState, adam, standardized

Gradient = tuple[Objective, AbstractDictionary]


def step(
    state: TrainState, x: Float[Array, "batch *reads"], y: Float[Array, "batch ..."], config: TrainConfig
) -> tuple[TrainState, StepMetrics]:
    """The next state, and metrics of the batch; `training.run` compiles many of these into one call."""
    module = state.module
    x = standardized(x, state.mean, state.scale)
    y = standardized(y, state.mean_out, state.scale_out)
    warm = jnp.minimum(1.0, (state.step + 1).astype(jnp.float32) / max(1, config.sparsity_warmup_steps))
    hyper = eqx.tree_at(lambda h: h.sparsity, state.hyper, state.hyper.sparsity * warm)
    objective, gradient = _gradient(module, x, y, hyper, state.since_fired, config)

    finite = (
        jnp.isfinite(objective.loss) & jnp.all(jnp.isfinite(gradient.b_dec)) & jnp.all(jnp.isfinite(gradient.b_enc))
    )
    good = finite & (state.bad_step < 0)
    module, optimizer = _update(state, gradient, good, config)
    progress = state.step.astype(jnp.float32) / config.steps
    module = module.settled(objective, Taken(hyper, good, progress, config.threshold_decay))

    since = jnp.where(objective.fired > 0, 0, state.since_fired + x.shape[0])
    wide = flat(y)
    variance = jnp.mean(jnp.sum(jnp.square(wide - jnp.mean(wide, axis=0, keepdims=True)), axis=-1))
    metrics = StepMetrics(
        objective.loss,
        jnp.where(variance > 0, objective.error / jnp.where(variance > 0, variance, 1.0), 0.0),
        objective.l0,
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
    module: AbstractDictionary,
    x: Float[Array, "batch *reads"],
    y: Float[Array, "batch ..."],
    hyper: Hyper,
    since_fired: Int32[Array, " d_sae"],
    config: TrainConfig,
) -> tuple[Objective, AbstractDictionary]:
    """The gradient by the cheapest exact path: sparse; sparse with AuxK where latents are dead; dense.

    Free rows are a parametrization of unit ones, (‖d_j‖ e_j, d_j / ‖d_j‖): a latent turns at a rate inverse to its
    length, so short new ones turn fast and those that fire often settle.
    """
    unit = config.frees(module) and module.unit_in_loss
    dtype = jnp.dtype(config.product_dtype)
    k_aux = min(max(1, x.shape[-1] // 2) if config.k_aux is None else config.k_aux, module.d_sae)

    def evaluate(objective: Callable[..., Objective], aux: bool) -> tuple[Objective, AbstractDictionary]:
        def total(module):
            module = module.unit_rows() if unit else module
            found = objective(module)
            loss = found.loss
            if aux and found.residual is not None:
                extra = _aux_loss(module, x, found.residual, (since_fired, config.dead_after), k_aux)
                loss = loss + hyper.aux * extra
            return loss, found._replace(residual=None)  # as long as the batch is wide, and needed no more

        (loss, found), gradient = eqx.filter_value_and_grad(total, has_aux=True)(module)
        return found._replace(loss=loss), gradient

    def dense(module: AbstractDictionary) -> Objective:
        return module.loss(x, y, hyper, dtype)

    if not isinstance(module, AbstractKSparse):
        return evaluate(dense, False)
    aux = k_aux > 0 and config.aux > 0
    which = jnp.any(since_fired >= config.dead_after).astype(jnp.int32) if aux else jnp.int32(0)
    if not module.sparse_pays():
        return _taken(which, [lambda: evaluate(dense, False), *([lambda: evaluate(dense, True)] if aux else [])])
    meant = module.unit_rows() if unit else module
    assert isinstance(meant, AbstractKSparse)
    chosen = lax.stop_gradient(meant.select(x, hyper, dtype, module.candidates(config.candidates)))

    def sparse(module: AbstractKSparse) -> Objective:
        return module.sparse_loss(x, y, chosen)

    paths = [lambda: evaluate(sparse, False), *([lambda: evaluate(sparse, True)] if aux else [])]
    if not module.exactly_k:
        which = jnp.where(chosen.overflow, len(paths), which)
        paths.append(lambda: evaluate(dense, aux))
    return _taken(which, paths)


def _taken(which: Int32[Array, ""], paths: Sequence[Callable[[], Gradient]]) -> Gradient:
    """What the path of this number gives; all members of a vmap take one."""
    return lax.switch(_shared(which), paths) if len(paths) > 1 else paths[0]()


def _aux_loss(
    module: AbstractKSparse,
    x: Float[Array, "batch *reads"],
    residual: Float[Array, "batch width"],
    silence: tuple[Int[Array, " d_sae"], int],
    k_aux: int,
) -> Float[Array, ""]:
    """AuxK over the 2·k_aux latents that have not fired for longest: all of the dead while they are no more.

    `silence`: rows since each latent fired, and after how many it is dead.
    """
    since_fired, dead_after = silence
    silent, candidates = lax.top_k(since_fired, min(2 * k_aux, module.d_sae))
    pre, rows = module.offered(x, candidates)
    return losses.auxk(residual, pre, silent >= dead_after, rows, k_aux)


@jax.custom_batching.custom_vmap
def _shared(which: Int32[Array, ""]) -> Int32[Array, ""]:
    """The path that all members of a vmap take: each is exact for all, and own ones would make them compute all three."""
    return which


@_shared.def_vmap
def _shared_by_members(_size, batched, which):
    return (jnp.max(which) if batched[0] else which), False


def _update(
    state: TrainState, gradient: AbstractDictionary, good: Bool[Array, ""], config: TrainConfig
) -> tuple[AbstractDictionary, optax.OptState]:
    """Adam; where the step is not good every leaf stays bit for bit, without another pass over memory."""
    module = state.module
    on_sphere = module.unit_norm and not config.frees(module)
    over = tuple(range(1, module.decoder.ndim))
    if on_sphere:  # the part along the decoder would only be undone by the normalization
        along = jnp.sum(gradient.decoder * module.decoder, axis=over, keepdims=True)
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
        shrink = jnp.where(good, 1.0 / row_lengths(module.decoder), 1.0)
        module = eqx.tree_at(lambda m: m.decoder, module, module.decoder * jnp.expand_dims(shrink, over))
    return module, optimizer


def bias_rate(module: AbstractDictionary, hyper: Hyper, config: TrainConfig) -> Float[Array, ""] | float:
    """How fast biases and thresholds move, over the matrices' learning rate: as told, or as suits the form."""
    if config.bias_rate is not None:
        return config.bias_rate
    return module.bias_rate(config.steps * hyper.learning_rate)


def _schedule(step: Array, config: TrainConfig) -> Array:
    done = step.astype(jnp.float32)
    rise = (done + 1.0) / max(1, config.warmup_steps)
    fall = (config.steps - done) / max(1, config.decay_steps)
    return jnp.clip(jnp.minimum(rise, fall if config.decay_steps else 1.0), 0.0, 1.0)


def _average(state: TrainState, module: AbstractDictionary, config: TrainConfig) -> AbstractDictionary | None:
    if state.average is None or config.average_decay is None:
        return None
    done = state.step.astype(jnp.float32)
    decay = jnp.minimum(config.average_decay, (1.0 + done) / (10.0 + done))  # forget the start sooner
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, module)
