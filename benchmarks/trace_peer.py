"""Rows of attribution as circuit-tracer makes them, asked by trace.py on stdin, answered on stdout.

Runs under any Python that has circuit-tracer; imports of this repository only resident.py, which needs nothing.
"""

import importlib.metadata
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from circuit_tracer import ReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens import loading_from_pretrained
from transformers import PreTrainedTokenizerFast

from resident import peak_bytes, reset_peak

CPU = torch.device("cpu")
USED = ("circuit-tracer", "transformer-lens", "torch")


def main() -> None:
    ask = json.load(sys.stdin)
    logging.disable(logging.WARNING)
    torch.set_num_threads(ask["threads"])
    model = opened(Path(ask["model"]), Path(ask["transcoders"]))
    reset_peak()
    answer = traced(model, torch.tensor(ask["tokens"]), torch.tensor(ask["targets"]), ask["batch"])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in USED)
    print(json.dumps(answer | {"peak_bytes": peak_bytes(), "versions": versions}))


def opened(model: Path, transcoders: Path) -> Any:
    """The model and the set in two directories, with nothing fetched; its rows stay in their files."""
    word = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"0": 0}, unk_token="0")), bos_token="0")
    word.save_pretrained(model)  # it wants one, though tokens are given
    loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(str(model))  # TransformerLens opens no others
    config = yaml.safe_load((transcoders / "config.yaml").read_text())
    count = len(list(transcoders.glob("layer_*.safetensors")))
    some = load_transcoder_set(
        {layer: str(transcoders / f"layer_{layer}.safetensors") for layer in range(count)},
        scan="random",
        feature_input_hook=config["feature_input_hook"],
        feature_output_hook=config["feature_output_hook"],
        device=CPU,
        dtype=torch.float32,
    )
    return ReplacementModel.from_pretrained_and_transcoders(str(model), some, device=CPU, dtype=torch.float32)


def traced(model: Any, tokens: torch.Tensor, targets: torch.Tensor, batch: int) -> dict[str, Any]:
    """Seconds of the pass before, and of the rows of these features [targets, (layer, position, latent)], as `attribute`
    makes them; Σ |weights| of each row."""
    start = time.perf_counter()
    context = model.setup_attribution(tokens)
    model.run_forward_pass(tokens, batch, context)
    prepared = time.perf_counter() - start
    active = context.activation_matrix.indices().T
    number = {tuple(each): at for at, each in enumerate(active.tolist())}
    chosen = torch.tensor([number[tuple(each)] for each in targets.tolist()])
    kept = torch.zeros(len(chosen), context._row_size)
    start = time.perf_counter()
    for begin in range(0, len(chosen), batch):
        at = chosen[begin : begin + batch]
        rows = context.compute_batch(
            layers=active[at, 0], positions=active[at, 1], inject_values=context.encoder_vecs[at]
        )
        kept[begin : begin + len(at)] = rows
    taken = time.perf_counter() - start
    return {"features": len(active), "prepared": prepared, "seconds": taken, "sums": kept.abs().sum(1).tolist()}


if __name__ == "__main__":
    main()
