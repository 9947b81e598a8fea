"""Small models with random transcoders, and the graphs of one sequence: what tests of circuits share."""

import functools
from collections.abc import Sequence

import numpy as np

import qwen_eqx
import sae
import tiny
from qwen_lab import circuits
from qwen_lab.circuits import Graph, Options
from sae.forms.transcoders import Layer

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
KINDS = {  # what transcoders read, whether latents cross layers, whether there is a skip; of which model
    "plain": ("hook_resid_mid", False, False, "qwen3"),
    "cross": ("mlp.hook_in", True, True, "qwen2"),
}
EVERYTHING = Options(max_features=None, batch=16, logits=3)


@functools.cache
def transcoders(kind: str) -> tuple[qwen_eqx.Qwen, sae.Transcoders]:
    site, crosses, skips, name = KINDS[kind]
    model = tiny.model(name)
    return model, drawn(model.config, site, crosses=crosses, skips=skips, threshold=0.1 if kind == "plain" else None)


def drawn(
    config: qwen_eqx.QwenConfig, site: str, *, crosses: bool, skips: bool, threshold: float | None
) -> sae.Transcoders:
    """Random ones for a model of this shape."""
    rng = np.random.default_rng(7)
    width, layers, d_sae = config.d_model, config.layers, 9

    def array(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    return sae.Transcoders(
        tuple(
            Layer(
                array(d_sae, width),
                array(d_sae),
                array(d_sae, layers - layer if crosses else 1, width),
                array(width),
                None if threshold is None else np.full(d_sae, threshold, np.float32),
                array(width, width) if skips else None,
            )
            for layer in range(layers)
        ),
        site,
        "hook_mlp_out",
    )


@functools.cache
def tokenizer() -> qwen_eqx.Tokenizer:
    return qwen_eqx.from_pretrained("tiny-random")[1]


def traced(kind: str, options: Options = EVERYTHING, tokens: Sequence[int] = TOKENS) -> Graph:
    model, some = transcoders(kind)
    return circuits.trace(model, tokenizer(), some, tokens, options)


whole = functools.cache(traced)
