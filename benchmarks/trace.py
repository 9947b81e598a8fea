"""Rows of an attribution graph per second, beside the machine's matrix rate, and the memory that a sweep takes."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import measure
import sae
from qwen_eqx.model.frozen import Targets
from qwen_lab.circuits import direct_effects, replace
from qwen_lab.circuits.replacement import Replacement
from qwen_lab.circuits.rows import swept
from sae.forms.transcoders import Layer


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "small"
    """`small` (45 M parameters), a preset's name, or `tiny`."""
    d_sae: int = 16_384
    """Features a layer."""
    k: int = 32
    """Features that fire at a position."""
    prompts: tuple[int, ...] = (256, 1024)
    """Tokens of each text."""
    batch: int = 64
    """Targets of one sweep."""
    repeats: int = 3
    """Timings of each sweep; the median is shown."""


def main(config: Config) -> None:
    shape = measure.config_of(config.shape)
    model = measure.random_model(shape, "float32")
    transcoders = random_transcoders(config, shape.layers, shape.d_model)
    limit = measure.matrix_gflop_per_s("float32", 2048)
    rows = []
    for prompt in config.prompts:
        measure.say(f"{prompt} tokens")
        replacement = replace(model, transcoders, measure.random_prompts(shape, 1, prompt)[0].tolist())
        layer = np.arange(config.batch) * shape.layers // config.batch
        position = np.full(config.batch, prompt - 1)
        vector = jax.random.normal(jax.random.key(0), (config.batch, shape.d_model))
        direct_effects(replacement, layer, position, vector, config.batch)  # compiles
        taken = measure.seconds(
            lambda r=replacement, at=(layer, position, vector): direct_effects(r, *at, config.batch), config.repeats
        )
        rate = products(replacement, config.batch) / taken / 1e9
        row = [prompt, f"{len(replacement.features):,}", f"{config.batch / taken:,.1f}", f"{rate / limit:.0%}"]
        targets = Targets(jnp.asarray(layer, jnp.int32), jnp.asarray(position, jnp.int32), vector)
        rows.append([*row, *(f"{size / 1e6:,.1f}" for size in memory(replacement, targets))])
    size = f"{config.shape}, {shape.parameters / 1e6:,.1f} M parameters, float32, random weights"
    measure.heading("Tracing", f"{size}; {config.d_sae:,} features a layer, sweeps of {config.batch} targets")
    measure.table(["tokens", "features", "targets/s", "of the matrix rate", "MB held", "MB of a sweep"], rows)


def random_transcoders(config: Config, layers: int, d_model: int) -> sae.Transcoders:
    """Of which k latents fire at every position."""
    rng = np.random.default_rng(0)

    def layer() -> Layer:
        encoder, decoder = (rng.standard_normal((config.d_sae, d_model), np.float32) for _ in range(2))
        bias = np.zeros(config.d_sae, np.float32)

        @jax.jit
        def rule(x: jax.Array) -> jax.Array:
            pre = jax.nn.relu(x @ encoder.T)
            return jnp.where(pre >= jax.lax.top_k(pre, config.k)[0][:, -1:], pre, 0.0)

        return Layer(encoder, bias, decoder[:, None], np.zeros(d_model, np.float32), rule=rule)

    return sae.Transcoders(tuple(layer() for _ in range(layers)), "hook_resid_mid", "hook_mlp_out")


def products(replacement: Replacement, batch: int) -> float:
    """Operations of a sweep whose deepest target is in the last layer: all layers, for all targets."""
    mixing, rows = replacement.frozen.mixing, replacement.sources.rows
    layers, kv_heads, group, seq, _ = mixing.pattern.shape
    d_head, d_model = mixing.value.shape[2:]
    heads = kv_heads * group
    a_layer = seq * d_model * d_head * (heads + kv_heads) + heads * seq * seq * d_head + rows[0].size
    return 2.0 * batch * layers * a_layer


def memory(replacement: Replacement, targets: Targets) -> tuple[int, int]:
    """Bytes of what every sweep reads, and of what the compiler says that one needs beside it."""
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((replacement.frozen, replacement.sources)))
    compiled = cast(Any, swept).lower(replacement.frozen, replacement.sources, targets).compile()
    analysis = compiled.compiled.memory_analysis()
    return held, analysis.temp_size_in_bytes + analysis.output_size_in_bytes


if __name__ == "__main__":
    measure.run(main, Config)
