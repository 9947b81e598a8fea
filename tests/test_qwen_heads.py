"""An edit of a head or a neuron is the edit of the whole site that leaves the others as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_eqx
import tiny
import tolerances
from qwen_eqx import Ablate, AbstractEdit, InputError, Patch, Replace, Steer

TOKENS = [5, 9, 1, 96, 0, 3, 3]
RNG = np.random.default_rng(0)
D_HEAD = tiny.CONFIGS["qwen2"].d_head
VALUES = jnp.asarray(RNG.normal(size=(2, D_HEAD)), jnp.float32)
TWO = jnp.asarray(RNG.normal(size=2 * D_HEAD), jnp.float32)
NEURONS = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
WHERE = jnp.asarray([1, -1])
EDITS = {  # the edit; what it does to rows [seq, width]; which columns it may change
    "patch a head of z": (
        Patch(VALUES, WHERE, site="blocks.0.attn.hook_z", head=3),
        lambda x: x.at[jnp.asarray([1, 6])].set(VALUES), range(3 * D_HEAD, 4 * D_HEAD),
    ),
    "steer a head of q": (
        Steer(VALUES[0], 2.0, site="blocks.1.attn.hook_q", head=0), lambda x: x + 2 * VALUES[:1], range(D_HEAD)
    ),
    "ablate a head of k": (Ablate(site="blocks.0.attn.hook_k", head=1), lambda x: 0 * x, range(D_HEAD, 2 * D_HEAD)),
    "project from a head of v": (
        Ablate(VALUES[0], site="blocks.1.attn.hook_v", head=1),
        lambda x: x - jnp.outer(x @ VALUES[0], VALUES[0]) / (VALUES[0] @ VALUES[0]), range(D_HEAD, 2 * D_HEAD),
    ),
    "replace a head": (Replace(jnp.tanh, site="blocks.0.attn.hook_z", head=2), jnp.tanh, range(2 * D_HEAD, 3 * D_HEAD)),
    "steer two heads": (
        Steer(TWO, site="blocks.0.attn.hook_z", head=[3, 0]),
        lambda x: x + TWO[None], [*range(3 * D_HEAD, 4 * D_HEAD), *range(D_HEAD)],
    ),
    "ablate a neuron": (Ablate(site="blocks.1.mlp.hook_post", neuron=17), lambda x: 0 * x, [17]),
    "patch neurons": (
        Patch(NEURONS, WHERE, site="blocks.0.mlp.hook_post", neuron=[23, 0, 5]),
        lambda x: x.at[jnp.asarray([1, 6])].set(NEURONS), [23, 0, 5],
    ),
}  # fmt: skip


def run(edits: list[AbstractEdit], site: str):
    logits, acts = tiny.model().run_with_capture(TOKENS, [site], edits=edits)
    return logits, acts[site]


@pytest.mark.parametrize("name", EDITS)
def test_only_the_part_is_edited(name: str):
    edit, by_hand, columns = EDITS[name]
    columns = jnp.asarray(list(columns))
    plain, before = run([], edit.site)
    logits, after = run([edit], edit.site)
    expected = before.at[:, columns].set(by_hand(before[:, columns]))
    np.testing.assert_allclose(after, expected, **tolerances.SAME_F32)
    whole, _ = run([Patch(expected, jnp.arange(len(TOKENS)), site=edit.site)], edit.site)
    np.testing.assert_allclose(logits, whole, **tolerances.SAME_F32)
    assert np.abs(logits - plain).max() > 1e-3


@pytest.mark.parametrize("name", ["steer two heads", "patch a head of z", "ablate a neuron"])
def test_generation_edits_the_same_part(name: str):
    edit = EDITS[name][0]
    found = qwen_eqx.generate(tiny.model(), [TOKENS], max_new_tokens=1, edits=[edit])
    logits, _ = run([edit], edit.site)
    log_probs = jax.nn.log_softmax(logits[-1])
    assert int(found.tokens[0, 0]) == int(log_probs.argmax())
    np.testing.assert_allclose(found.log_probs[0, 0], log_probs.max(), **tolerances.LOGITS_F32)


def test_every_head_through_one_compilation():
    """The head is a number in the program, so that a sweep over heads may even be one call."""

    def last(head: jax.Array | int) -> jax.Array:
        edit = Ablate(site="blocks.0.attn.hook_z", head=head)
        return tiny.model().run_with_capture(TOKENS, [], edits=[edit], logits="last")[0]

    together = jax.vmap(last)(jnp.arange(4))
    for head in range(4):
        np.testing.assert_allclose(together[head], last(head), **tolerances.SAME_F32)


BAD = {
    "a head beyond": (Ablate(site="blocks.0.attn.hook_z", head=4), ["Ablate.head", "4", "0..3"]),
    "a head before": (Ablate(site="blocks.0.attn.hook_z", head=-1), ["Ablate.head", "-1", "0..3"]),
    "a head of keys beyond": (Ablate(site="blocks.0.attn.hook_k", head=2), ["Ablate.head", "2", "0..1"]),
    "a head of a stream": (Ablate(site="model.layers.0", head=0), ["Ablate.head", "hook_resid_post", "attn.hook_z"]),
    "a neuron of heads": (Ablate(site="blocks.0.attn.hook_z", neuron=0), ["Ablate.neuron", "mlp.hook_post"]),
    "a neuron beyond": (Ablate(site="blocks.0.mlp.hook_post", neuron=[1, 24]), ["Ablate.neuron", "24", "0..23"]),
    "a head twice": (Ablate(site="blocks.0.attn.hook_z", head=[1, 1]), ["Ablate.head", "[1, 1]", "once"]),
    "no head": (Ablate(site="blocks.0.attn.hook_z", head=[]), ["Ablate.head", "whole number"]),
    "half a head": (Ablate(site="blocks.0.attn.hook_z", head=jnp.ones(1)), ["Ablate.head", "whole number"]),
    "a head and a neuron": (Ablate(site="blocks.0.attn.hook_z", head=0, neuron=0), ["head and neuron"]),
    "another width": (Steer(TWO, site="blocks.0.attn.hook_z", head=0), ["Steer.direction", "12", "6"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_parts_that_are_not_there_are_refused_in_one_line(name: str):
    edit, parts = BAD[name]
    with pytest.raises(InputError) as caught:
        run([edit], "model.layers.0")
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
