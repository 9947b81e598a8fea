"""A model that trains on a mesh, fully sharded, equals one on one device; its checkpoints lie anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import qwen_eqx
from qwen_eqx import make_mesh, training
from qwen_eqx.training import loop, loss, sharding
from sae.training import checkpoint
from tolerances import SAME_F32

SHAPE = qwen_eqx.QwenConfig(
    model_type="qwen2", vocab=32, d_model=16, layers=1, heads=4, kv_heads=2, d_head=4, d_ff=24, max_seq=64, tied=True,
    rope_theta=1e4,
)  # fmt: skip


def mesh_of(data: int, model: int) -> jax.sharding.Mesh:
    return make_mesh(f"data={data},model={model}", devices=jax.devices()[: data * model])


def start(optimizer: str = "adamw", lora: int = 0) -> tuple[training.TrainState, training.TrainConfig]:
    # Adam would turn the rounding of a zero gradient into a whole step
    config = training.TrainConfig(steps=4, learning_rate=1e-2, eps=1e-2, optimizer=optimizer, weight_decay=0.1)
    model = qwen_eqx.Qwen.init(SHAPE, key=jax.random.key(0), dtype=jnp.float32)
    model = training.LoRA.wrap(model, rank=lora) if lora else model
    return training.init(model, config), config


def batches(documents: int, steps: int = 2) -> training.Batch:
    rng = np.random.default_rng(0)
    shape = (steps, 1, documents, 5)
    weights = rng.random(shape).astype(np.float32)
    return training.Batch(rng.integers(0, SHAPE.vocab, shape), weights, weights > 0.7)


@functools.cache
def alone(optimizer: str, documents: int):
    state, config = start(optimizer)
    return training.run(state, batches(documents), config)


def held(state: training.TrainState) -> int:
    """Bytes on each device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


# a batch of 8, of which not every logit is made at once; and of 6, which 4 does not divide
@pytest.mark.parametrize(("shape", "optimizer", "documents"), [((4, 2), "adamw", 8), ((4, 1), "muon", 6)])
def test_a_model_trains_on_a_mesh_as_on_one_device(shape, optimizer, documents, monkeypatch):
    expected = alone(optimizer, documents)
    if optimizer == "adamw":
        monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 3 * SHAPE.vocab)
    state, config = start(optimizer)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    mesh = mesh_of(*shape)
    state = training.place(state, mesh)
    assert held(state) < 1.3 * whole / mesh.size  # k and v of two heads, norms
    where = sharding.by_documents(mesh, documents, 2)
    asked = loop.Given(config, jax.device_put(batches(documents), where), mesh)
    compiled = loop._run.lower(asked, state).compile()
    assert compiled.compiled.memory_analysis().alias_size_in_bytes >= held(state)  # written in place
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    found = compiled(asked, state)
    for leaf, where in zip(jax.tree.leaves(found[0]), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, **SAME_F32)


def test_a_lora_lies_beside_its_matrix():
    state, _ = start(lora=2)
    placed = training.place(state, mesh_of(2, 2)).model.blocks[0]
    for lora, out, into in ((placed.attn.q, "model", "data"), (placed.mlp.down, "data", "model")):
        assert lora.linear.weight.sharding.spec == P(out, into)
        assert (lora.a.sharding.spec, lora.b.sharding.spec) == (P(None, into), P(out, None))


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
    state, _ = start("muon")
    placed = training.place(state, mesh_of(4, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "AT_ONCE", 1024)
        checkpoint.save(tmp_path, 1, placed)
    blank = jax.tree.map(jnp.zeros_like, state)
    for like in (blank, training.place(blank, mesh_of(2, 4))):
        found, _, _ = checkpoint.load(tmp_path, like)
        for leaf, other, old in zip(*map(jax.tree.leaves, (found, like, state)), strict=True):
            assert leaf.sharding == other.sharding
            np.testing.assert_array_equal(leaf, old)
