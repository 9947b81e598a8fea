"""Choosing the next token: small composable modules over float32 logits."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Integer, Key, PRNGKeyArray

from qwen_eqx.errors import InputError

Logits = Float32[Array, "batch vocab"]
Seen = Bool[Array, "batch vocab"]
_FEW = 256  # top-p looks among this many before it searches the whole vocabulary


class AbstractSampler(eqx.Module):
    """Chooses one token per row. `seen` marks each row's prompt and generated tokens, and is kept only if asked for."""

    uses_seen: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, logits: Logits, keys: Key[Array, " batch"], seen: Seen | None) -> Int[Array, " batch"]: ...


class Greedy(AbstractSampler):
    """argmax of the logits, the lowest id among equals."""

    def __call__(self, logits: Logits, keys: Key[Array, " batch"], seen: Seen | None) -> Int[Array, " batch"]:
        return likeliest(logits)


def likeliest(logits: Logits) -> Int[Array, " batch"]:
    """argmax of each row, the lowest id among equals.

    XLA:CPU compares pairs of value and index one at a time; two plain reductions vectorise, and `logsumexp` shares the
    first. Over many rows the second one spills, hence 8 at a time (docs/LOG.md).
    """
    tokens = jax.lax.platform_dependent(logits, cpu=_first_of_the_greatest, default=lambda all: jnp.argmax(all, -1))
    return tokens.astype(jnp.int32)


def _first_of_the_greatest(logits: Logits) -> Int[Array, " batch"]:
    best = logits.max(axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[1])[None, :]
    below = logits < best
    parts = [jnp.where(below[row : row + 8], ids.size, ids).min(axis=-1) for row in range(0, logits.shape[0], 8)]
    return jnp.concatenate(parts)


class AbstractFilter(AbstractSampler):
    """Changes logits; on its own it samples from what it leaves."""

    @abstractmethod
    def filter(self, logits: Logits, seen: Seen | None) -> Logits:
        """The logits to sample from; −inf forbids a token."""

    def __call__(self, logits: Logits, keys: Key[Array, " batch"], seen: Seen | None) -> Int[Array, " batch"]:
        return draw(self.filter(logits, seen), keys)


def _number(name: str, value: object, most: float = float("inf")) -> Float32[Array, ""]:
    if isinstance(value, int | float) and not 0 < value <= most:
        raise InputError(f"{name}={value} must be above 0" + (f" and at most {most:g}" if most < float("inf") else ""))
    return jnp.asarray(value, jnp.float32)


class Temperature(AbstractFilter):
    """logits / temperature."""

    temperature: Float32[Array, ""] = eqx.field(converter=lambda t: _number("temperature", t))

    def filter(self, logits: Logits, seen: Seen | None) -> Logits:
        return logits / self.temperature


class TopK(AbstractFilter):
    """Keeps the k greatest logits (arXiv 1805.04833), and any equal to the k-th."""

    k: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k={self.k} must be at least 1")

    def filter(self, logits: Logits, seen: Seen | None) -> Logits:
        if self.k == 1:  # ties would leave two; greedy takes the first
            first = likeliest(logits)[:, None]
            return jnp.where(jnp.arange(logits.shape[-1])[None, :] == first, logits, -jnp.inf)
        # float32: on CPU a bf16 top_k falls back to a sort of the whole vocabulary
        least = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return jnp.where(logits >= least, logits, -jnp.inf)


class TopP(AbstractFilter):
    """Keeps the smallest set of most probable tokens whose probabilities sum to p (arXiv 1904.09751), and ties."""

    p: Float32[Array, ""] = eqx.field(converter=lambda p: _number("p", p, 1.0))

    def filter(self, logits: Logits, seen: Seen | None) -> Logits:
        probs = jax.nn.softmax(logits, axis=-1)
        few = min(_FEW, logits.shape[-1])
        best = jax.lax.top_k(probs, few)[0]
        before = jnp.cumsum(best, axis=-1) - best  # probability of everything better
        kept = before < self.p
        among_few = jnp.where(kept, best, jnp.inf).min(axis=-1)
        enough = ~kept[:, -1] | (few == logits.shape[-1])
        least = jax.lax.cond(enough.all(), lambda: among_few, lambda: _least_kept(probs, self.p))
        return jnp.where((probs >= least[:, None]) | (self.p >= 1), logits, -jnp.inf)


class MinP(AbstractFilter):
    """Keeps tokens at least p times as probable as the best one (arXiv 2407.01082)."""

    p: Float32[Array, ""] = eqx.field(converter=lambda p: _number("p", p, 1.0))

    def filter(self, logits: Logits, seen: Seen | None) -> Logits:
        return jnp.where(logits >= logits.max(axis=-1, keepdims=True) + jnp.log(self.p), logits, -jnp.inf)


class RepetitionPenalty(AbstractFilter):
    """Divides positive and multiplies negative logits of tokens already seen (arXiv 1909.05858; as transformers does)."""

    penalty: Float32[Array, ""] = eqx.field(converter=lambda r: _number("penalty", r))
    uses_seen: ClassVar[bool] = True

    def filter(self, logits: Logits, seen: Seen | None) -> Logits:
        if seen is None:
            raise InputError("RepetitionPenalty needs `seen`: the tokens of the prompt and those generated so far")
        penalized = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return jnp.where(seen, penalized, logits)


class Chain(AbstractSampler):
    """Filters one after another; the last step chooses: `Chain(RepetitionPenalty(1.2), Temperature(0.7), TopP(0.9))`."""

    steps: tuple[AbstractSampler, ...]

    def __init__(self, *steps: AbstractSampler):
        if not steps or not all(isinstance(step, AbstractFilter) for step in steps[:-1]):
            raise InputError("Chain: every step but the last must be a filter, and there must be one")
        self.steps = steps

    def __call__(self, logits: Logits, keys: Key[Array, " batch"], seen: Seen | None) -> Int[Array, " batch"]:
        *filters, last = self.steps
        for step in filters:
            assert isinstance(step, AbstractFilter)
            logits = step.filter(logits, seen)
        return last(logits, keys, seen)


def needs_seen(sampler: AbstractSampler) -> bool:
    """Whether a sampler must be told which tokens have been seen."""
    return any(map(needs_seen, sampler.steps)) if isinstance(sampler, Chain) else sampler.uses_seen


def row_keys(
    key: PRNGKeyArray | None, items: Integer[np.ndarray, " batch"], samples: Integer[np.ndarray, " batch"]
) -> Key[Array, " batch"]:
    """One key per row, folded from (seed, item, sample): a sequence is the same alone, in any batch, in any order."""
    root = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(root.dtype, jax.dtypes.prng_key):
        root = jax.random.wrap_key_data(root)  # a key of jax.random.PRNGKey
    return _fold(root, jnp.asarray(items, jnp.uint32), jnp.asarray(samples, jnp.uint32))


@jax.jit
def _fold(
    root: PRNGKeyArray, items: Integer[Array, " batch"], samples: Integer[Array, " batch"]
) -> Key[Array, " batch"]:
    return jax.vmap(lambda item, sample: jax.random.fold_in(jax.random.fold_in(root, item), sample))(items, samples)


def draw(logits: Logits, keys: Key[Array, " batch"]) -> Int[Array, " batch"]:
    """One token per row from softmax(logits), by inverting the cumulative distribution in two levels.

    Two uniforms per row, not one Gumbel variable per token: first a group of about sqrt(vocab) tokens, then one in it.
    """
    batch, vocab = logits.shape
    size = max(1, round(vocab**0.5))
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    groups = jnp.pad(weights, ((0, 0), (0, -vocab % size))).reshape(batch, -1, size)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    group = _invert(groups.sum(-1), uniforms[:, 0])
    inside = _invert(jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    return (group * size + inside).astype(jnp.int32)


def _invert(weights: Float32[Array, "batch n"], uniform: Float32[Array, " batch"]) -> Int[Array, " batch"]:
    """The first index whose cumulative weight exceeds uniform · total; never one of weight zero."""
    cumulative = jnp.cumsum(weights, axis=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    # a sum taken as a tree is not monotone in its last bit: a weight of zero can seem to step over the target
    reached = (cumulative > target) & (weights > 0)
    return jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1))


def _least_kept(probs: Float32[Array, "batch vocab"], p: Float32[Array, ""]) -> Float32[Array, " batch"]:
    """The least probability in the nucleus, by bisection over the bit patterns of non-negative float32 (31 steps, exact)."""

    def halve(_, bounds):
        low, high = bounds  # mass above `low` reaches p, mass above `high` does not
        middle = low + (high - low) // 2
        value = jax.lax.bitcast_convert_type(middle, jnp.float32)
        reaches = jnp.where(probs >= value[:, None], probs, 0.0).sum(-1) >= p
        return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

    start = jnp.zeros(probs.shape[0], jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.full(probs.shape[0], 1.5, jnp.float32), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (start, one))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
