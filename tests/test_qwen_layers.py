"""The parts of a block, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import qwen_eqx
import tiny
import tolerances
from qwen_eqx.model import attention
from qwen_eqx.model.attention import attend, blockwise
from qwen_eqx.model.layers import Embedding, Linear, RMSNorm, SwiGLU, matmul
from qwen_eqx.model.rope import Rotation


def normal(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


@given(seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4, 1e18]))
def test_rms_norm(seed: int, scale: float):
    """Large rows too: an attention sink's norm is a thousand times the median."""
    norm = RMSNorm(normal(seed, 8), 1e-6)
    x = normal(seed + 1, 3, 8) * scale
    np.testing.assert_allclose(norm(x), oracles.rms_norm(wide(x), wide(norm.weight), 1e-6), **tolerances.SAME_F32)


def test_rms_norm_in_bfloat16_squares_in_float32():
    norm = RMSNorm(normal(0, 64, dtype="bfloat16"), 1e-6)
    x = normal(1, 3, 64, dtype="bfloat16")
    assert norm(x).dtype == jnp.bfloat16
    expected = oracles.rms_norm(wide(x), wide(norm.weight), 1e-6)
    np.testing.assert_allclose(wide(norm(x)), expected, rtol=2**-8)  # one rounding, at the end


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(), (1,), (7,), (8,), (2, 3), (3, 5)])
def test_linear_accumulates_in_float32(rows: tuple[int, ...], dtype: str):
    """Any leading dimensions; below and above the row count at which a bf16 product is padded."""
    layer = Linear(normal(0, 5, 96, dtype=dtype), normal(1, 5, dtype=dtype))
    x = normal(2, *rows, 96, dtype=dtype)
    expected = wide(x) @ wide(layer.weight).T + wide(layer.bias)
    assert layer(x).dtype == jnp.float32
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(matmul(x, layer.weight), expected - wide(layer.bias), rtol=1e-5, atol=2e-5)


def test_linear_without_bias():
    layer = Linear.init(4, 3, bias=False, dtype=jnp.float32, key=jax.random.key(0))
    x = normal(0, 2, 4)
    assert layer.bias is None
    np.testing.assert_allclose(layer(x), wide(x) @ wide(layer.weight).T, **tolerances.SAME_F32)


@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_swiglu(seed: int):
    mlp = SwiGLU(*(Linear(normal(seed + i, *shape), None) for i, shape in enumerate([(6, 4), (6, 4), (4, 6)])))
    x, met = normal(seed + 9, 1, 3, 4), {}
    hidden = oracles.silu(wide(x) @ wide(mlp.gate.weight).T) * (wide(x) @ wide(mlp.up.weight).T)
    y = mlp(x, lambda kind, value: met.setdefault(kind, value))
    np.testing.assert_allclose(met.pop("mlp_post"), hidden, **tolerances.SAME_F32)
    np.testing.assert_allclose(y, hidden @ wide(mlp.down.weight).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(mlp(x), y)
    assert not met


def test_embedding_looks_rows_up():
    embed = Embedding(normal(0, 7, 3))
    ids = np.asarray([[0, 6], [3, 3]])
    np.testing.assert_array_equal(embed(jnp.asarray(ids)), np.asarray(embed.table)[ids])


@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_attend_groups_query_heads_over_key_heads(seed: int):
    seq, kv_heads, group, d_head = 5, 2, 3, 4
    q = normal(seed, 1, seq, kv_heads, group, d_head)
    k, v = normal(seed + 1, 1, kv_heads, seq, d_head), normal(seed + 2, 1, kv_heads, seq, d_head)
    causal = jnp.tril(jnp.ones((1, seq, seq), bool))
    z = attend(q, k, v, causal)
    for head in range(kv_heads):
        for member in range(group):
            expected = oracles.attention(wide(q[0, :, head, member]), wide(k[0, head]), wide(v[0, head]))
            np.testing.assert_allclose(z[0, :, head, member], expected, **tolerances.SAME_F32)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_attention_by_itself(name: str):
    """W_o z against the plain statement of a whole decoder, whose first block reads the norm of the embeddings."""
    model, tokens = tiny.model(name), np.random.default_rng(0).integers(0, 50, 7)
    block, places = model.blocks[0], oracles.decoder(model, tokens)[1]
    x = block.attn_norm(model.embed(jnp.asarray(tokens)[None]))
    rotation = Rotation.at(jnp.arange(7)[None], model.config.d_head, model.config.rope_theta)
    met = {}
    y, cache = block.attn(x, rotation, jnp.tril(jnp.ones((1, 7, 7), bool)), tap=lambda kind, a: met.setdefault(kind, a))
    assert list(met) == ["q", "k", "v", "z"]
    for kind, value in (met | {"attn_out": y}).items():
        np.testing.assert_allclose(value[0], places[0, kind], err_msg=kind, **tolerances.LOGITS_F32)
    assert cache.keys.shape == (1, model.config.kv_heads, 7, model.config.d_head)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_block_keep_the_dtype_they_read(dtype: str):
    block, x = tiny.model(dtype=dtype).blocks[0], normal(0, 1, 3, 16, dtype=dtype)
    rotation = Rotation.at(jnp.arange(3)[None], 6, 10_000.0)
    y, cache = block.attn(x, rotation, jnp.tril(jnp.ones((1, 3, 3), bool)))
    assert {part.dtype for part in (y, cache.keys, cache.values, block.mlp(x))} == {jnp.dtype(dtype)}


def test_what_the_mask_hides_cannot_matter():
    q, k, v = normal(0, 1, 2, 1, 2, 4), normal(1, 1, 1, 3, 4), normal(2, 1, 1, 3, 4)
    mask = jnp.asarray([[[True, True, False], [True, True, False]]])
    other = attend(q, k.at[:, :, 2].set(1e30), v.at[:, :, 2].set(1e30), mask)
    np.testing.assert_array_equal(attend(q, k, v, mask), other)


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v = normal(0, 1, 1, 1, 1, 4), normal(1, 1, 1, 3, 4), normal(2, 1, 1, 3, 4)
    assert np.isfinite(attend(q, k, v, jnp.zeros((1, 1, 3), bool))).all()


@settings(max_examples=20)
@given(data=st.data())
def test_attention_in_blocks_equals_attention_at_once(data):
    """Any mask, blocks that nobody sees and queries that see nothing among them; the last block may be short."""
    rows, kv_seq = data.draw(st.sampled_from([(3, 7), (4, 8), (6, 13)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    q, k, v = (jnp.asarray(3 * rng.normal(size=(2, 2, n, 4)), jnp.float32) for n in (rows, kv_seq, kv_seq))
    mask = rng.random((2, 1, rows, kv_seq)) < data.draw(st.sampled_from([0.2, 0.7]))
    mask[:, :, :, : data.draw(st.integers(0, kv_seq))] = False
    z = np.asarray(blockwise(q, k, v, jnp.asarray(mask), 4))
    scores = np.where(mask, np.einsum("bhqd,bhsd->bhqs", *map(np.float64, (q, k))) / 2, -np.inf)
    sees = mask.any(-1, keepdims=True)
    weights = np.exp(scores - np.where(sees, scores.max(-1, keepdims=True), 0))
    expected = np.einsum("bhqs,bhsd->bhqd", weights, np.float64(v)) / np.where(sees, weights.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(z, expected, **tolerances.SAME_F32)


def test_a_long_prompt_in_chunks_and_blocks_equals_a_plain_forward(monkeypatch: pytest.MonkeyPatch):
    """Two chunks of 300 over 601 entries: past the size from which attention goes block by block."""
    model = tiny.random_model(dataclasses.replace(tiny.CONFIGS["qwen2"], max_seq=1024))
    prompt = np.random.default_rng(0).integers(0, 97, 600).tolist()
    out = qwen_eqx.generate(model, [prompt], max_new_tokens=1, prefill_chunk=300)
    monkeypatch.setattr(attention, "BLOCK", 10_000)
    whole = jax.nn.log_softmax(model(jnp.asarray(prompt))[-1])
    np.testing.assert_allclose(out.log_probs[0, 0], whole.max(), **tolerances.SAME_F32)


def test_attention_in_blocks_has_the_gradient_of_attention_at_once():
    q, k, v = (normal(seed, 1, 1, length, 4) for seed, length in enumerate((5, 12, 12)))
    mask = jnp.tril(jnp.ones((5, 12), bool), 7)[None, None]

    def total(k: jax.Array, block: int) -> jax.Array:
        return (blockwise(q, k, v, mask, block) ** 2).sum()

    np.testing.assert_allclose(jax.grad(total)(k, 4), jax.grad(total)(k, 12), **tolerances.SAME_F32)
