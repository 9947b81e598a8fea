"""What is left when patterns and norm scales are held: equal to the model's own stream, to autograd, and to differences."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
import tiny
from qwen_eqx import Qwen, QwenConfig
from qwen_eqx.model.frozen import Frozen, Passed, Targets, freeze
from qwen_eqx.model.rope import Rotation
from tolerances import LOGITS_F32, SAME_F32

SHAPES = [("qwen2", 2, 2), ("qwen2", 1, 7), ("qwen3", 2, 1)]  # family, kv heads, group
SEQ, LAYERS, D_MODEL = 7, 2, 10
TOKENS = [3, 1, 4, 1, 5, 9, 2]


@functools.cache
def frozen(family: str, kv_heads: int, group: int) -> tuple[Qwen, Frozen, Passed]:
    config = QwenConfig(
        family, 23, D_MODEL, LAYERS, kv_heads * group, kv_heads, 4, 12, 64, rope_theta=10_000.0, tied=False
    )  # fmt: skip
    model = tiny.random_model(config, seed=group)
    return model, *freeze(model, TOKENS)


def targets(seed: int) -> Targets:
    """One of every block, one of the stream after the last, one that reads nothing; out of order."""
    rng = np.random.default_rng(seed)
    layers = np.asarray([1, LAYERS, 0, 1, -1, 1])
    vectors = rng.normal(size=(len(layers), D_MODEL)).astype(np.float32)
    return Targets(jnp.asarray(layers), jnp.asarray(rng.integers(SEQ, size=len(layers))), jnp.asarray(vectors))


@eqx.filter_jit
def pulled(frozen: Frozen, targets: Targets) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[layers targets seq d_model], [targets seq d_model], [targets]."""
    return frozen.pull(targets, lambda layer, g: g)


def readings(targets: Targets, mids: np.ndarray, last: np.ndarray) -> np.ndarray:
    streams = np.concatenate([mids, last[None]])
    read = np.einsum("tm,tm->t", streams[targets.layer, targets.position], targets.vector)
    return np.where(np.asarray(targets.layer) < 0, 0, read)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_gives_the_models_own_stream(shape: tuple[str, int, int]):
    _, held, passed = frozen(*shape)
    mids, last = held(passed.embed, passed.mlp_out)
    np.testing.assert_allclose(mids, passed.mid, **SAME_F32)
    np.testing.assert_allclose(last, passed.last, **SAME_F32)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_and_the_constant_add_up_to_each_reading(shape: tuple[str, int, int]):
    _, held, passed = frozen(*shape)
    some = targets(0)
    at_mlps, at_embed, constant = pulled(held, some)
    total = jnp.einsum("ltsm,lsm->t", at_mlps, passed.mlp_out) + jnp.einsum("tsm,sm->t", at_embed, passed.embed)
    np.testing.assert_allclose(total + constant, readings(some, passed.mid, passed.last), **LOGITS_F32)
    assert constant[4] == 0
    assert not at_mlps[:, 4].any(), "a target of no layer reads nothing"
    assert (constant[np.asarray(some.layer) >= 0] != 0).any() == (shape[0] == "qwen2")  # Qwen3 has no value biases


def by_autograd(model: Qwen, passed: Passed, some: Targets) -> tuple[jax.Array, jax.Array]:
    """vjp of a pass in which patterns and scales are recomputed and stopped; heads are repeated, not grouped."""
    config = model.config
    rotation = Rotation.at(jnp.arange(SEQ)[None], config.d_head, config.rope_theta)

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        scale = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
        return x * jax.lax.stop_gradient(scale) * weight[None]

    def heads(x: jax.Array, count: int, normed: eqx.Module | None) -> jax.Array:
        x = x.reshape(1, SEQ, count, config.d_head)
        x = rotation(x if normed is None else normed(x))  # pyright: ignore[reportCallIssue]
        return jnp.repeat(x[0], config.heads // count, axis=1)

    def streams(embed: jax.Array, written: jax.Array) -> jax.Array:
        x, found = embed, []
        for block, out in zip(model.blocks, written, strict=True):
            attn, normed = block.attn, norm(x, block.attn_norm.weight)
            q, k = heads(attn.q(normed), config.heads, attn.q_norm), heads(attn.k(normed), config.kv_heads, attn.k_norm)
            scores = jnp.einsum("qnh,snh->nqs", q, k) / np.sqrt(config.d_head).astype(np.float32)
            causal = jnp.tril(jnp.ones((SEQ, SEQ), bool))[None]
            pattern = jax.lax.stop_gradient(jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1))
            v = jnp.repeat(attn.v(normed).reshape(SEQ, config.kv_heads, -1), config.heads // config.kv_heads, axis=1)
            mid = x + attn.o(jnp.einsum("nqs,snh->qnh", pattern, v).reshape(SEQ, -1))
            found.append(mid)
            x = mid + out
        return jnp.stack([*found, x])

    _, back = jax.vjp(streams, passed.embed, passed.mlp_out)

    def one(layer: jax.Array, position: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        read = jnp.zeros((LAYERS + 1, SEQ, D_MODEL)).at[layer, position].set(vector)
        return back(jnp.where(layer < 0, 0.0, read))

    return jax.vmap(one)(some.layer, some.position, some.vector)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_transpose_by_hand_is_autograds(shape: tuple[str, int, int]):
    model, held, passed = frozen(*shape)
    some = targets(1)
    at_mlps, at_embed, _ = pulled(held, some)
    of_embed, of_mlps = eqx.filter_jit(by_autograd)(model, passed, some)
    np.testing.assert_allclose(at_mlps.swapaxes(0, 1), of_mlps, **SAME_F32)
    np.testing.assert_allclose(at_embed, of_embed, **SAME_F32)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_transpose_is_what_finite_differences_say(shape: tuple[str, int, int]):
    """In float64, of one write at a time: at every block, every position, along a random direction."""
    model, held, _ = frozen(*shape)
    some, step = targets(2), 0.5  # the map is affine: any step will do
    at_mlps, at_embed, _ = pulled(held, some)
    streams, embed, written = oracles.frozen_decoder(model, TOKENS)
    rng = np.random.default_rng(0)
    for layer in range(-1, LAYERS):
        for position in range(SEQ):
            direction = rng.normal(size=D_MODEL)
            difference = []
            for sign in (1, -1):
                moved = [embed.copy(), written.copy()]
                (moved[0][position] if layer < 0 else moved[1][layer, position])[:] += sign * step * direction
                difference.append(readings(some, *streams(*moved)))
            g = at_embed[:, position] if layer < 0 else at_mlps[layer, :, position]
            expected = (difference[0] - difference[1]) / (2 * step)
            np.testing.assert_allclose(np.asarray(g, np.float64) @ direction, expected, **LOGITS_F32)


@pytest.mark.parametrize("normed", [True, False])
def test_a_skip_is_a_path_that_is_not_held(normed: bool):
    """Folded into the write by hand, and by the map: what the MLP's norm makes of the stream, times W."""
    _, held, passed = frozen("qwen2", 2, 2)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(LAYERS, D_MODEL, D_MODEL)).astype(np.float32)) * 0.3
    read = passed.mid * held.mlp_scale[:, :, None] * held.mlp_gain[:, None] if normed else passed.mid
    by_skip = jnp.einsum("lsm,lmo->lso", read, weight)
    skipping = held.with_skip(weight, normed)
    mids, last = skipping(passed.embed, passed.mlp_out - by_skip)
    np.testing.assert_allclose(last, passed.last, **SAME_F32)
    some = targets(4)
    at_mlps, at_embed, constant = pulled(skipping, some)
    total = jnp.einsum("ltsm,lsm->t", at_mlps, passed.mlp_out - by_skip) + jnp.einsum(
        "tsm,sm->t", at_embed, passed.embed
    )
    np.testing.assert_allclose(total + constant, readings(some, mids, last), **LOGITS_F32)
    assert not np.allclose(at_mlps, pulled(held, some)[0])
