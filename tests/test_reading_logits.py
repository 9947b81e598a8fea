"""Logit lens and direct attribution: what the head says of every depth, and parts that sum to the logits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import qwen_eqx
import strategies
import tiny
import tolerances
from qwen_eqx import InputError, QwenConfig

TOKENS = [5, 9, 1, 46, 0, 3, 3]
GROUPS = {  # Qwen2 has biases, Qwen3 norms of queries and keys
    "group 1": QwenConfig("qwen2", 31, 12, 1, 3, 3, 4, 20, 64, tied=False),
    "group 2": QwenConfig("qwen3", 31, 12, 2, 4, 2, 10, 20, 64, tied=False),
    "group 7": QwenConfig("qwen2", 31, 20, 1, 14, 2, 4, 28, 64, tied=True),
}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_lens_is_the_head_at_every_depth(name: str):
    model = tiny.model(name)
    lens = qwen_eqx.logit_lens(model, TOKENS, targets=[3, 9], k=4)
    logits, places = oracles.decoder(model, TOKENS)
    assert lens.targets.labels["site"] == (
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    )
    head = np.asarray(model.embed.table if model.head is None else model.head.weight, np.float64)
    gain = np.asarray(model.norm.weight, np.float64)
    streams = [places[0, "resid_pre"], places[0, "resid_post"], places[1, "resid_post"]]
    for number, x in enumerate(streams):
        table = oracles.log_softmax(oracles.rms_norm(x, gain, model.config.norm_eps) @ head.T)
        np.testing.assert_allclose(lens.targets.values[number], table[:, [3, 9]], **tolerances.LOGITS_F32)
        np.testing.assert_allclose(lens.log_probs.values[number], -np.sort(-table)[:, :4], **tolerances.LOGITS_F32)
    np.testing.assert_array_equal(lens.ids.values[-1, :, 0], logits.argmax(axis=-1))


@given(tokens=strategies.token_ids(31, 1, 16), targets=st.lists(st.integers(0, 30), min_size=2, max_size=2))
@settings(max_examples=4)
@pytest.mark.parametrize("name", GROUPS)
def test_parts_sum_to_the_logits(name: str, tokens: list[int], targets: list[int]):
    model = tiny.random_model(GROUPS[name])
    found = qwen_eqx.logit_attribution(model, tokens, targets)
    logits, places = oracles.decoder(model, tokens)
    np.testing.assert_allclose(found.parts.sum("part").values, logits[:, targets], **tolerances.LOGITS_F32)
    np.testing.assert_allclose(found.rounding.values, 0, atol=1e-4)  # nothing is left over
    head = np.asarray(model.embed.table if model.head is None else model.head.weight, np.float64)
    towards = head[targets] * np.asarray(model.norm.weight, np.float64)
    for layer in range(model.config.layers):
        each = (
            places[layer, "result"].reshape(len(tokens), model.config.heads, -1) / places[0, "final_scale"][:, :, None]
        )
        expected = np.einsum("shd,td->hst", each, towards)
        np.testing.assert_allclose(found.heads.at(layer=layer).values, expected, **tolerances.LOGITS_F32)
    sources = qwen_eqx.head_sources(model, tokens, targets)
    last = found.heads.at(position=len(tokens) - 1)
    np.testing.assert_allclose(sources.sum("source").values, last.values, **tolerances.LOGITS_F32)


def test_a_source_s_share_is_its_value_through_the_pattern():
    model, config = tiny.model("qwen2"), tiny.CONFIGS["qwen2"]
    found = qwen_eqx.head_sources(model, TOKENS, [3], position=4).at(layer=1, target=3)
    _, places = oracles.decoder(model, TOKENS)
    weight = np.asarray(model.blocks[1].attn.o.weight, np.float64).T.reshape(config.heads, config.d_head, -1)
    towards = np.asarray(model.head.weight[3] * model.norm.weight, np.float64) / places[0, "final_scale"][4]
    v = places[1, "v"].reshape(len(TOKENS), config.kv_heads, -1)
    for head in range(config.heads):
        expected = places[1, "pattern"][head, 4] * (v[:, head // config.group] @ weight[head] @ towards)
        np.testing.assert_allclose(found.at(head=head).values, expected, **tolerances.LOGITS_F32)
    assert not found.values[:, 5:].any()  # no query reads a later position


def test_in_bfloat16_the_remainder_is_said():
    found = qwen_eqx.logit_attribution(tiny.model(dtype="bfloat16"), TOKENS, [3])
    logits, _ = tiny.model(dtype="bfloat16").run_with_capture(TOKENS, [])
    np.testing.assert_allclose(found.parts.sum("part").values[:, 0], logits[:, 3], **tolerances.LOGITS_F32)
    assert 0 < np.abs(found.rounding.values).max() < 0.1 * np.abs(found.logits.values).max()


def test_labels_choose_sum_and_rank():
    values = qwen_eqx.Labelled(np.asarray([[1.0, -5.0], [2.0, 3.0]]), {"layer": (4, 7), "head": (0, 1)})
    assert values.at(layer=7).values.tolist() == [2.0, 3.0]
    assert values.at(layer=7, head=1).values == 3.0
    assert values.sum("layer").labels == {"head": (0, 1)}
    assert values.top(2) == [({"layer": 4, "head": 1}, -5.0), ({"layer": 7, "head": 1}, 3.0)]
    assert repr(values) == "Labelled(layer=2, head=2)"


MODEL = tiny.model()
WRONG = {
    "a label": (lambda: qwen_eqx.Labelled(np.zeros(2), {"a": (0, 1)}).at(a=2), ["a: found 2", r"(0, 1)"]),
    "an axis": (lambda: qwen_eqx.Labelled(np.zeros(2), {"a": (0, 1)}).sum("b"), ["'b'", "one of a"]),
    "too few labels": (lambda: qwen_eqx.Labelled(np.zeros(2), {"a": (0,)}), ["(2,)", "(1,)"]),
    "a narrow site": (lambda: qwen_eqx.logit_lens(MODEL, TOKENS, sites=["blocks.0.attn.hook_k"]), ["12 wide", "16 wide"]),
    "a target": (lambda: qwen_eqx.logit_attribution(MODEL, TOKENS, [97]), ["targets", "97"]),
    "no target": (lambda: qwen_eqx.logit_attribution(MODEL, TOKENS, []), ["targets: found no token"]),
    "a position": (lambda: qwen_eqx.head_sources(MODEL, TOKENS, [3], position=7), ["position: found 7", "-7..6"]),
    "a rank": (lambda: qwen_eqx.logit_lens(MODEL, TOKENS, k=98), ["k: found 98", "1..97"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_there_is_refused_in_one_line(name: str):
    call, parts = WRONG[name]
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)
