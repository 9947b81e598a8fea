"""Data with known features, made on the device, and how well a dictionary found them.

SynthSAEBench (arXiv 2602.14687). Stated by its authors for the 16k model, and the defaults here: 16,384 unit features
in 768 dimensions; Zipf firing with exponent 0.5 from 0.4 to 5e-4; 128 trees of branching 4 and depth 3, all siblings
mutually exclusive; correlation of rank 25 and scale 0.1 through a Gaussian copula; 100 steps of orthogonalization at
rate 3e-4; mean magnitudes linear from 5 to 4, their spread folded normal (0.5, 0.5); a mean L0 near 34. Chosen here:
no bias; features numbered breadth first; drawing probabilities raised to make up for the tree (the mean L0 is then
34.2, without it 13.4); children not scaled by the parent's magnitude; a surviving sibling drawn uniformly.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sae import shown
from sae.errors import InputError


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Sizes and laws of a synthetic model; the defaults are SynthSAEBench-16k's."""

    features: int = 16_384
    d_model: int = 768
    zipf_exponent: float = 0.5
    p_max: float = 0.4
    p_min: float = 5e-4
    roots: int = 128  # 0: no hierarchy
    branching: int = 4
    depth: int = 3
    correlation_rank: int = 25  # 0: independent
    correlation_scale: float = 0.1
    orthogonal_steps: int = 100
    orthogonal_rate: float = 3e-4
    mean_first: float = 5.0  # magnitude of the most frequent feature
    mean_last: float = 4.0
    spread_mean: float = 0.5
    spread_std: float = 0.5
    bias: float = 0.0  # norm of a constant added to every activation

    def __post_init__(self) -> None:
        if self.features < 1 or self.d_model < 1:
            raise InputError(f"features, d_model: found {self.features}, {self.d_model}, expected at least 1")
        if not 0 < self.p_min <= self.p_max <= 1:
            raise InputError(f"p_min, p_max: found {self.p_min}, {self.p_max}, expected 0 < p_min <= p_max <= 1")


class Sample(NamedTuple):
    """Activations, and the coefficients of the true features in them."""

    x: Float[Array, "batch d_model"]
    coefficients: Float[Array, "batch features"]

    def __repr__(self) -> str:
        return shown.by_field(self)


class SyntheticModel(eqx.Module):
    """x = Σ_i c_i d_i + bias, c sparse, correlated and hierarchical; unit d_i."""

    directions: Float[Array, "features d_model"]
    bias: Float[Array, " d_model"]
    thresholds: Float[Array, " features"]  # feature i fires where its Gaussian exceeds this
    factor: Float[Array, "features rank"]
    means: Float[Array, " features"]
    spreads: Float[Array, " features"]
    levels: tuple[tuple[int, int, int], ...] = eqx.field(static=True)  # (start, stop, start of the parents) per level
    branching: int = eqx.field(static=True)

    @classmethod
    def init(cls, config: SyntheticConfig, *, key: PRNGKeyArray) -> "SyntheticModel":
        keys = jax.random.split(key, 4)
        size = config.features
        directions = jax.random.normal(keys[0], (size, config.d_model), jnp.float32)
        directions = orthogonalize(_unit(directions), config.orthogonal_steps, config.orthogonal_rate)
        factor = config.correlation_scale * jax.random.normal(keys[1], (size, config.correlation_rank), jnp.float32)
        share = jnp.sum(jnp.square(factor), axis=-1, keepdims=True)
        factor = factor * jnp.sqrt(jnp.minimum(1.0, 0.99 / jnp.maximum(share, 1e-12)))  # leaves 1 % of its own variance
        spreads = jnp.abs(config.spread_mean + config.spread_std * jax.random.normal(keys[2], (size,), jnp.float32))
        bias = _unit(jax.random.normal(keys[3], (1, config.d_model), jnp.float32))[0] * config.bias
        return cls(
            directions=directions,
            bias=bias,
            thresholds=jax.scipy.stats.norm.isf(_compensated(zipf(config), config)).astype(jnp.float32),
            factor=factor,
            means=jnp.linspace(config.mean_first, config.mean_last, size, dtype=jnp.float32),
            spreads=spreads,
            levels=_levels(config),
            branching=config.branching,
        )

    def sample(self, batch: int, *, key: PRNGKeyArray) -> Sample:
        """`batch` independent activations."""
        common, own, size, choose = jax.random.split(key, 4)
        features, rank = self.factor.shape
        alone = jnp.sqrt(1.0 - jnp.sum(jnp.square(self.factor), axis=-1))
        gaussian = jax.random.normal(own, (batch, features), jnp.float32) * alone[None]
        if rank:
            gaussian = gaussian + jax.random.normal(common, (batch, rank), jnp.float32) @ self.factor.T
        magnitude = self.means[None] + self.spreads[None] * jax.random.normal(size, gaussian.shape, jnp.float32)
        fires = self._obey_tree((gaussian > self.thresholds[None]) & (magnitude > 0), choose)
        coefficients = jnp.where(fires, jax.nn.relu(magnitude), 0.0)
        return Sample(coefficients @ self.directions + self.bias[None], coefficients)

    def _obey_tree(self, fires: Bool[Array, "batch features"], key: PRNGKeyArray) -> Bool[Array, "batch features"]:
        """A child fires only if its parent does, and of siblings that would, one; level by level from the roots."""
        parts = [fires[:, : self.levels[0][0]]] if self.levels else [fires]
        for start, stop, above in self.levels:
            key, now = jax.random.split(key)
            families = (stop - start) // self.branching
            parent = parts[-1][:, :families] if above else fires[:, :families]
            children = fires[:, start:stop].reshape(fires.shape[0], families, self.branching) & parent[:, :, None]
            lot = jnp.where(children, jax.random.uniform(now, children.shape), -1.0)
            winner = children & (lot == jnp.max(lot, axis=-1, keepdims=True))
            parts.append(winner.reshape(fires.shape[0], stop - start))
        if self.levels:
            parts.append(fires[:, self.levels[-1][1] :])
        return jnp.concatenate(parts, axis=-1)


def zipf(config: SyntheticConfig) -> Float[Array, " features"]:
    """p_i = p_min + (p_max − p_min)(i^−a − n^−a)/(1 − n^−a), i = 1…n."""
    ranks = jnp.arange(1, config.features + 1, dtype=jnp.float32) ** -config.zipf_exponent
    low, high = ranks[-1], ranks[0]
    share = (ranks - low) / jnp.where(high > low, high - low, 1.0)
    return config.p_min + (config.p_max - config.p_min) * jnp.where(high > low, share, 1.0)


def orthogonalize(
    directions: Float[Array, "features d_model"], steps: int, rate: float
) -> Float[Array, "features d_model"]:
    """`steps` of Adam on Σ_{i≠j} ⟨d_i, d_j⟩² + n Σ_i (‖d_i‖² − 1)², then unit length (arXiv 2602.14687, §3.1)."""
    count = directions.shape[0]
    adam = optax.adam(rate)

    def gradient(d):
        # Σ_ij ⟨d_i, d_j⟩² = ‖DᵀD‖², whose gradient needs no features × features matrix
        square = jnp.sum(jnp.square(d), axis=-1, keepdims=True)
        return 4 * (d @ (d.T @ d)) - 4 * square * d + 4 * count * (square - 1) * d

    def turn(_, carry):
        d, state = carry
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
            change, state = adam.update(gradient(d), state)
        return d + change, state

    if not steps:
        return directions
    return _unit(jax.jit(lambda d: lax.fori_loop(0, steps, turn, (d, adam.init(d)))[0])(directions))


def mcc(found: Float[Array, "latents d_model"], true: Float[Array, "features d_model"]) -> float:
    """Mean |cosine| over the one-to-one matching that maximizes it (Hungarian); 1 is best."""
    cosines = _cosines(found, true)
    rows, columns = scipy.optimize.linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean())


def uniqueness(found: Float[Array, "latents d_model"], true: Float[Array, "features d_model"]) -> float:
    """Distinct nearest features over latents; 1 is best, less means several latents share a feature."""
    nearest = _cosines(found, true).argmax(axis=1)
    return len(np.unique(nearest)) / len(nearest)


def classification(
    z: Float[Array, "rows latents"],
    coefficients: Float[Array, "rows features"],
    found: Float[Array, "latents d_model"],
    true: Float[Array, "features d_model"],
) -> dict[str, float]:
    """Each latent as a detector of its nearest feature: precision, recall and F1, mean over latents."""
    nearest = _cosines(found, true).argmax(axis=1)
    fires, truth = np.asarray(z) > 0, np.asarray(coefficients)[:, nearest] > 0
    hit, claimed, real = (fires & truth).sum(0), fires.sum(0), truth.sum(0)
    precision = hit / np.maximum(claimed, 1)
    recall = hit / np.maximum(real, 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {"precision": float(precision.mean()), "recall": float(recall.mean()), "f1": float(f1.mean())}


def r_squared(x: Float[Array, "rows d_model"], x_hat: Float[Array, "rows d_model"]) -> float:
    """1 − Σ‖x − x̂‖²/Σ‖x − x̄‖²; 1 is best."""
    true, guess = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    return float(1 - np.square(true - guess).sum() / np.square(true - true.mean(0)).sum())


def mean_maximum_cosine(directions: Float[Array, "features d_model"]) -> float:
    """ρ = mean_i max_{j≠i} |⟨d_i, d_j⟩|, how far the features are in superposition."""
    cosines = _cosines(directions, directions)
    np.fill_diagonal(cosines, 0)
    return float(cosines.max(axis=1).mean())


def _compensated(probabilities: Float[Array, " features"], config: SyntheticConfig) -> Float[Array, " features"]:
    """p / p_parent · (1 + Σ siblings' p / p_parent), at most 1: what is drawn so that about p survives."""
    drawn = probabilities
    for start, stop, above in _levels(config):
        families = (stop - start) // config.branching
        own = probabilities[start:stop].reshape(families, config.branching)
        parent = probabilities[above : above + families, None]
        rivals = jnp.sum(own, axis=-1, keepdims=True) - own
        drawn = drawn.at[start:stop].set((own / parent * (1.0 + rivals / parent)).reshape(-1))
    return jnp.minimum(drawn, 1.0 - 1e-6)


def _levels(config: SyntheticConfig) -> tuple[tuple[int, int, int], ...]:
    """Breadth-first numbering: whole families only, the features left over belong to no tree."""
    levels, start, parents, above = [], config.roots, config.roots, 0
    for _ in range(config.depth if config.roots else 0):
        families = min(parents, max(0, config.features - start) // config.branching)
        if not families:
            break
        stop = start + families * config.branching
        levels.append((start, stop, above))
        above, parents, start = start, stop - start, stop
    return tuple(levels)


def _cosines(a: Array, b: Array) -> np.ndarray:
    return np.abs(np.asarray(_unit(jnp.asarray(a)) @ _unit(jnp.asarray(b)).T, np.float64))


def _unit(matrix: Array) -> Array:
    return matrix / jnp.maximum(jnp.linalg.norm(matrix, axis=-1, keepdims=True), 1e-12)
