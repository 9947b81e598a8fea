"""A config.json comes in and goes out whole, and what is not implemented is refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given

import strategies
from qwen_eqx import PRESETS, InputError, QwenConfig

QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "hidden_act": "silu",
    "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "attention_dropout": 0.0,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "rope_theta": 1000000, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "rope_scaling": None, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
MISSING = object()


def changed(base: dict, **fields) -> dict:
    return {name: value for name, value in (base | fields).items() if value is not MISSING}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back(name: str):
    fields = json.loads(json.dumps(PRESETS[name].to_hf("bfloat16")))
    assert QwenConfig.from_hf(fields) == PRESETS[name]
    assert fields["torch_dtype"] == "bfloat16"


@given(config=strategies.configs())
def test_every_config_comes_back(config: QwenConfig):
    assert QwenConfig.from_hf(json.loads(json.dumps(config.to_hf("float32")))) == config


def test_the_hub_s_files_are_the_presets():
    assert QwenConfig.from_hf(QWEN2) == PRESETS["Qwen2.5-0.5B"]
    assert QwenConfig.from_hf(QWEN3) == PRESETS["Qwen3-0.6B"]


def test_the_published_sizes_are_there():
    sizes = {"Qwen2.5": "0.5B 1.5B 3B 7B 14B 32B 72B", "Qwen3": "0.6B 1.7B 4B 8B 14B 32B"}
    assert set(PRESETS) == {f"{family}-{size}" for family, line in sizes.items() for size in line.split()}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 500_000},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, "type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": None},
    ],
)
def test_rope_in_every_spelling(rope: dict):
    config = QwenConfig.from_hf(changed(QWEN2, rope_theta=MISSING) | rope)
    assert config.rope_theta == 5e5
    assert isinstance(config.rope_theta, float)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": None}, {"layer_types": ["full_attention"] * 24}, {"layer_types": None}, {"head_dim": None},
        {"head_dim": 64}, {"quantization_config": None}, {"unknown_field_of_a_later_version": {"a": 1}},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_accepted(fields: dict):
    assert QwenConfig.from_hf(changed(QWEN2, **fields)) == PRESETS["Qwen2.5-0.5B"]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
REFUSED = {  # what, base, fields, what the line must hold
    "another family": (QWEN2, {"model_type": "llama"}, ["model_type", "'llama'", "'qwen2' or 'qwen3'"]),
    "a mixture of experts": (QWEN3, {"model_type": "qwen3_moe"}, ["model_type", "'qwen3_moe'"]),
    "no family": (QWEN2, {"model_type": MISSING}, ["model_type", "missing"]),
    "a number for a family": (QWEN2, {"model_type": 2}, ["model_type", "2", "str"]),
    "rope scaling": (QWEN2, {"rope_scaling": YARN}, ["rope_scaling", "yarn", "not implemented"]),
    "rope scaling, old key": (QWEN2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
    "rope scaling, new place": (QWEN2, {"rope_parameters": {"rope_theta": 1e6} | YARN}, ["rope_parameters", "yarn"]),
    "rope scaling by default": (
        QWEN2,
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "factor": 2.0}},
        ["rope_parameters.factor"],
    ),
    "rope parameters without theta": (
        QWEN2,
        {"rope_parameters": {"rope_type": "default"}},
        ["rope_parameters", "rope_theta", "missing"],
    ),
    "rope parameters as a list": (QWEN2, {"rope_parameters": [1e6]}, ["rope_parameters", "object"]),
    "no rope at all": (QWEN2, {"rope_theta": MISSING}, ["rope_theta", "missing"]),
    "partial rotary": (QWEN2, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    "a sliding window in use": (QWEN2, {"use_sliding_window": True}, ["use_sliding_window", "True"]),
    "sliding layers": (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding"]),
    "layer types as text": (QWEN2, {"layer_types": "full_attention"}, ["layer_types"]),
    "another activation": (QWEN2, {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    "no activation": (QWEN2, {"hidden_act": MISSING}, ["hidden_act", "None", "'silu'"]),
    "quantized weights": (QWEN2, {"quantization_config": {"bits": 4}}, ["quantization_config", "not implemented"]),
    "qwen3 with bias": (QWEN3, {"attention_bias": True}, ["attention_bias", "qwen3"]),
    "mlp bias": (QWEN2, {"mlp_bias": True}, ["mlp_bias"]),
    "experts": (QWEN2, {"num_experts": 60}, ["num_experts", "60"]),
    "an int as a bool": (QWEN2, {"hidden_size": True}, ["hidden_size", "True", "int"]),
    "an int as a float": (QWEN2, {"num_hidden_layers": 24.0}, ["num_hidden_layers", "24.0", "int"]),
    "an int as text": (QWEN2, {"vocab_size": "151936"}, ["vocab_size", "'151936'", "int"]),
    "an int as a list": (QWEN2, {"intermediate_size": [4864]}, ["intermediate_size", "list"]),
    "a float as text": (QWEN2, {"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "'1e-6'", "float"]),
    "a float as a bool": (QWEN2, {"rope_theta": True}, ["rope_theta", "True"]),
    "a bool as an int": (QWEN2, {"tie_word_embeddings": 1}, ["tie_word_embeddings", "1", "bool"]),
    "a negative size": (QWEN2, {"intermediate_size": -1}, ["d_ff=-1", "positive"]),
    "no layers": (QWEN2, {"num_hidden_layers": 0}, ["layers=0", "positive"]),
    "too many layers": (QWEN2, {"num_hidden_layers": 10**9}, ["layers=1000000000", "1024"]),
    "heads that do not divide": (QWEN2, {"num_key_value_heads": 4}, ["heads=14", "kv_heads=4"]),
    "no key heads": (QWEN2, {"num_key_value_heads": 0}, ["kv_heads=0"]),
    "no heads": (QWEN2, {"num_attention_heads": 0}, ["num_attention_heads=0"]),
    "an odd head": (QWEN3, {"head_dim": 127}, ["d_head=127", "even"]),
    "qwen3 without head_dim": (QWEN3, {"head_dim": MISSING}, ["head_dim", "missing"]),
    "a width that no head divides": (QWEN2, {"hidden_size": 900}, ["hidden_size=900", "head_dim"]),
    "eps of zero": (QWEN2, {"rms_norm_eps": 0.0}, ["norm_eps=0.0", "positive"]),
    "theta without end": (QWEN2, {"rope_theta": float("inf")}, ["rope_theta=inf", "finite"]),
    "theta that is no number": (QWEN2, {"rope_theta": float("nan")}, ["rope_theta=nan"]),
    "a number beyond floats": (QWEN2, {"rope_theta": 10**400}, ["rope_theta"]),
} | {
    f"no {name}": (QWEN2, {name: MISSING}, [name, "missing"])
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str):
    base, fields, parts = REFUSED[name]
    with pytest.raises(InputError) as caught:
        QwenConfig.from_hf(changed(base, **fields), "some/config.json")
    line = str(caught.value)
    assert line.startswith("some/config.json: ")
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("text", "part"),
    [("{", "config.json"), ("[]", "config.json"), ("", "config.json"), ('{"model_type": "gpt2"}', "'gpt2'")],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, part: str):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        QwenConfig.from_file(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FACTS = [
    {"vocab": 0}, {"d_model": 1.0}, {"layers": True}, {"d_head": 7}, {"kv_heads": 3}, {"tied": 1}, {"norm_eps": -1e-6},
    {"rope_theta": 0}, {"model_type": "qwen"}, {"max_seq": "64"},
]  # fmt: skip


@pytest.mark.parametrize("facts", BAD_FACTS, ids=str)
def test_a_config_made_by_hand_is_checked_too(facts: dict):
    good = QwenConfig("qwen2", 31, 12, 2, 4, 2, 6, 20, 64)
    values = dataclasses.asdict(good) | facts
    with pytest.raises((InputError, TypeError)) as caught:  # a wrong type may already fail the shape checks
        QwenConfig(**values)
    assert next(iter(facts)) in str(caught.value)


def test_a_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["Qwen2.5-0.5B"].layers = 3


def test_facts_that_follow():
    config = QwenConfig("qwen2", 31, 12, 2, 6, 2, 6, 20, 64)
    assert (config.group, config.qkv_bias, config.qk_norm) == (3, True, False)
    config = dataclasses.replace(config, model_type="qwen3")
    assert (config.qkv_bias, config.qk_norm) == (False, True)
