"""Make the golden fixtures: tiny random transformers models, what they compute, and the versions that computed it.

`python tests/golden/make.py`, in an environment with the `parity` extra, rewrites every directory beside it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

HERE = Path(__file__).parent
NEW_TOKENS = 12
SMALL_MARGIN = 1e-3  # a greedy choice closer than this would make the fixture a matter of rounding
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# name -> (model type, what differs from COMMON, how it is written)
CASES = {
    "qwen2-tied-group1": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {}),
    "qwen2-untied-group2-two-shards": ("qwen2", {}, {"shards": 2}),
    "qwen2-group7": ("qwen2", {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1}, {}),
    "qwen2-head-dim": ("qwen2", {"head_dim": 6, "num_hidden_layers": 3}, {"top_level_theta": True}),
    "qwen2-bfloat16": ("qwen2", {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}),
    "qwen3-untied": ("qwen3", {"head_dim": 16}, {}),
    "qwen3-tied-group4": ("qwen3", {"head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True}, {}),
    "qwen3-float16-two-shards": ("qwen3", {"head_dim": 8}, {"dtype": torch.float16, "shards": 2}),
    "qwen2-long": (
        "qwen2",
        {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {},
    ),
}
LENGTHS = {"qwen2-long": (301,)}  # past position 256, where bf16 angles would round
DEFAULT_LENGTHS = (1, 7, 33)


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A case's model in float32, every weight random: biases and norms of their initial 0 and 1 would test nothing."""
    kind, differs, _ = CASES[name]
    config_class = transformers.Qwen2Config if kind == "qwen2" else transformers.Qwen3Config
    config = config_class(**{**COMMON, **differs})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.2 * drawn + float("norm" in path))
            else:
                weight.copy_(drawn * (0.5 if "embed" in path else weight.shape[1] ** -0.5))
    return model


def write(name: str, model: transformers.PreTrainedModel, directory: Path) -> None:
    """The case's directory as transformers writes it."""
    how = CASES[name][2]
    stored = model.to(how.get("dtype", torch.float32))
    size = sum(weight.numel() * weight.element_size() for weight in stored.state_dict().values())
    shard = size // how.get("shards", 1) + 4096 * how.get("shards", 1)
    stored.save_pretrained(directory, max_shard_size=shard)
    if how.get("top_level_theta"):  # as transformers 4 spelled it
        fields = json.loads((directory / "config.json").read_text())
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def prompts(name: str, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, COMMON["vocab_size"], length) for length in LENGTHS.get(name, DEFAULT_LENGTHS)]


def expected(model: transformers.PreTrainedModel, ids: np.ndarray, new: int = NEW_TOKENS) -> dict[str, np.ndarray]:
    """Logits, `output_hidden_states` and the tokens of greedy `generate` for one prompt."""
    row = torch.tensor(ids)[None]
    with torch.no_grad():
        out = model(row, output_hidden_states=True)
        tokens = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        whole = model(tokens).logits[0, len(ids) - 1 : -1]
    best = whole.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > SMALL_MARGIN, "two tokens nearly tie: take another seed"
    return {
        "ids": ids.astype(np.int32),
        "logits": out.logits[0].numpy(),
        "hidden": torch.stack(out.hidden_states)[:, 0].numpy(),
        "greedy": tokens[0, len(ids) :].numpy().astype(np.int32),
    }


def make(name: str) -> None:
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    write(name, build(name), directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    # read back: what is stored in 16 bits is what must be computed with
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tensors = {}
    for index, ids in enumerate(prompts(name)):
        for field, array in expected(model, ids).items():
            if field != "hidden" or len(ids) < 100:
                tensors[f"{index}.{field}"] = np.ascontiguousarray(array)
    safetensors.numpy.save_file(tensors, directory / "expected.safetensors")


def main() -> None:
    for name in CASES:
        make(name)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    total = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"wrote {len(CASES)} cases, {total:,} bytes")


if __name__ == "__main__":
    main()
