"""circuit-tracer's graphs of the same small models and transcoders, asked for in a Python that has it.

`CIRCUIT_TRACER_PYTHON=/path/to/python python tests/circuits_peer.py` rewrites the fixtures that tests compare with.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import qwen_eqx
import sae
import tiny
from circuits_small import TOKENS, drawn

FIXTURES = Path(__file__).parent / "fixtures" / "circuit_tracer"
PYTHON = "CIRCUIT_TRACER_PYTHON"  # it wants older transformers than this environment has
LOGITS = 3
CASES = {  # model, what transcoders read, whether latents cross layers, whether there is a skip, thresholds
    "qwen3_per_layer": ("qwen3", "hook_resid_mid", False, False, 0.1),
    "qwen3_cross_layer_skip": ("qwen3", "mlp.hook_in", True, True, 0.1),
    "qwen2_per_layer_skip": ("qwen2", "mlp.hook_in", False, True, None),
}


@functools.cache
def case(name: str) -> tuple[qwen_eqx.Qwen, sae.Transcoders]:
    kind, site, crosses, skips, threshold = CASES[name]
    config = tiny.CONFIGS[kind]
    if kind == "qwen2":
        config = dataclasses.replace(config, d_head=config.d_model // config.heads)  # TransformerLens knows no other
    return tiny.random_model(config), drawn(config, site, crosses=crosses, skips=skips, threshold=threshold)


def ask(directory: Path) -> dict[str, Path]:
    """The graph of every case, as circuit-tracer makes it of what is written for it here."""
    asked, found = [], {}
    for name in CASES:
        (model, transcoders), home = case(name), directory / name
        qwen_eqx.save_pretrained(model, None, home / "model")
        sae.save_transcoders(transcoders, home / "transcoders")
        found[name] = home / "graph.safetensors"
        paths = {"model": home / "model", "transcoders": home / "transcoders", "out": found[name]}
        sizes = {"tokens": TOKENS, "logits": LOGITS, "vocab": model.config.vocab}
        asked.append({key: str(path) for key, path in paths.items()} | sizes)
    command = [os.environ.get(PYTHON, sys.executable), str(FIXTURES / "graphs.py")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=offline, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        for name, path in ask(Path(directory)).items():
            (FIXTURES / "graphs").mkdir(exist_ok=True)
            (FIXTURES / "graphs" / f"{name}.safetensors").write_bytes(path.read_bytes())
