"""What committed transformers models computed (tests/golden/make.py), computed again here."""

from functools import cache
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import qwen_eqx
import tolerances
from qwen_eqx.weights.hf import load_model

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.safetensors"))


@cache
def case(name: str) -> tuple[qwen_eqx.Qwen, list[dict[str, np.ndarray]]]:
    tensors = safetensors.numpy.load_file(GOLDEN / name / "expected.safetensors")
    prompts: list[dict[str, np.ndarray]] = [{} for _ in range(1 + max(int(key.split(".")[0]) for key in tensors))]
    for key, array in tensors.items():
        index, field = key.split(".")
        prompts[int(index)][field] = array
    return load_model(GOLDEN / name, dtype=jnp.float32), prompts


def test_the_cases_are_those_promised():
    models = [case(name)[0] for name in CASES]
    configs = [model.config for model in models]
    assert {config.model_type for config in configs} == {"qwen2", "qwen3"}
    assert {config.group for config in configs} >= {1, 2, 7}
    assert {(config.model_type, config.tied) for config in configs} == {
        (kind, tied) for kind in ("qwen2", "qwen3") for tied in (False, True)
    }
    assert any(config.d_head * config.heads != config.d_model for config in configs)
    assert any((GOLDEN / name / "model.safetensors.index.json").exists() for name in CASES)
    assert all(len(prompt["ids"]) % 2 for name in CASES for prompt in case(name)[1])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_residuals(name: str):
    model, prompts = case(name)
    layers = model.config.layers
    sites = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(layers))]
    for prompt in prompts:
        logits, acts = eqx.filter_jit(model.run_with_capture)(jnp.asarray(prompt["ids"]), tuple(sites))
        np.testing.assert_allclose(logits, prompt["logits"], **tolerances.LOGITS_F32)
        if "hidden" not in prompt:
            continue
        # output_hidden_states ends with the last residual after the final norm
        ours = [acts[site] for site in sites[:-1]] + [model.norm(acts[sites[-1]])]
        assert len(ours) == len(prompt["hidden"])
        for found, expected in zip(ours, prompt["hidden"], strict=True):
            np.testing.assert_allclose(found, expected, **tolerances.LOGITS_F32)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(name: str):
    """The prompts of a case go in together, ragged, and each gives what transformers gave for it alone."""
    model, prompts = case(name)
    new = len(prompts[0]["greedy"])
    out = qwen_eqx.generate(model, [prompt["ids"].tolist() for prompt in prompts], max_new_tokens=new)
    np.testing.assert_array_equal(out.tokens, np.stack([prompt["greedy"] for prompt in prompts]))
    np.testing.assert_array_equal(out.lengths, [new] * len(prompts))
