"""Bytes per device, collectives of a decode step and its predicted time: models over meshes, by formula, nothing is run."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh

import measure
from qwen_eqx import InputError, QwenConfig, sharding
from qwen_eqx.model.cache import cache_bytes
from qwen_eqx.weights.hf import skeleton


class Chip(NamedTuple):
    """What a vendor says of a device."""

    memory: float  # bytes
    read: float  # bytes/s of its memory
    link: float  # bytes/s to its neighbours, one way
    latency: float  # seconds of a collective that moves next to nothing


CHIPS = {
    "h100": Chip(80e9, 3.35e12, 450e9, 10e-6),
    "a100": Chip(80e9, 2.0e12, 300e9, 10e-6),
    "v5e": Chip(16e9, 0.82e12, 100e9, 5e-6),
}


@dataclasses.dataclass(frozen=True)
class Config:
    shape: tuple[str, ...] = ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-32B", "Qwen2.5-72B")
    """Presets' names, or `tiny`."""
    model: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Sizes of the model axis."""
    devices: int = 64
    """Of which the data axis takes what the model axis leaves."""
    rows: int = 8
    """Sequences on each group of devices that holds the model once."""
    kv_seq: int = 2048
    """Tokens of each."""
    chip: str = "h100"
    """Device: h100, a100 or v5e, by their vendors' figures."""


class Collective(NamedTuple):
    """What devices of one group exchange."""

    kind: str
    bytes: int  # of the result on each device

    def seconds(self, chip: Chip, size: int) -> float:
        """Of a ring: a sum goes round twice, a gathering once."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return chip.latency + rounds * (size - 1) / size * self.bytes / chip.link


def collectives(config: QwenConfig, mesh: AbstractMesh, rows: int, itemsize: int = 2) -> list[Collective]:
    """Those of one decode step of so many rows on a device; none where only rows are dealt.

    The sums are float32: after attention and after the MLP of each block. Then the embedding, in the model's dtype, and the
    logits, which every device has whole when it chooses.
    """
    size, made = mesh.shape["model"], list[Collective]()
    if size == 1:
        return made
    for count in (config.kv_heads, config.d_ff):
        made += [Collective("all-reduce", 4 * rows * config.d_model)] * (config.layers if count % size == 0 else 0)
    if config.vocab % size == 0:
        made.append(Collective("all-reduce", itemsize * rows * config.d_model))
        made.append(Collective("all-gather", 4 * rows * config.vocab))
    return made


def line(name: str, config: QwenConfig, size: int, asked: Config) -> list[object]:
    """A row of the table: a step reads its weights and its cache once, and waits for each collective."""
    chip, mesh = CHIPS[asked.chip], AbstractMesh((asked.devices // size, size), sharding.AXES)
    model = skeleton(config, jnp.dtype(jnp.bfloat16))
    weights = sharding.bytes_per_device(model, mesh)
    share = sharding.share(config, mesh)
    cache = cache_bytes(share, batch=asked.rows, kv_seq=asked.kv_seq, dtype=jnp.bfloat16)
    exchanged = collectives(config, mesh, asked.rows)
    read = (weights + cache) / chip.read
    waited = sum(each.seconds(chip, size) for each in exchanged)
    fits = "yes" if weights + cache < 0.9 * chip.memory else "no"
    rate = asked.rows * mesh.shape["data"] / (read + waited)
    moved = sum(each.bytes for each in exchanged)
    whole = ", ".join(said.partition("=")[0] for said in sharding.not_split(config, mesh)) or None
    shape = sharding.describe(mesh.shape["data"], size)
    numbers = [f"{weights / 1e9:.2f}", f"{cache / 1e9:.2f}", fits, len(exchanged), f"{moved / 1e6:.2f}"]
    return [name, shape, *numbers, f"{1e3 * read:.2f}", f"{1e3 * waited:.2f}", f"{rate:,.0f}", whole]


def main(config: Config) -> None:
    if config.chip not in CHIPS:
        raise InputError(f"chip: found {config.chip!r}, expected one of {', '.join(CHIPS)}")
    shapes = {name: measure.config_of(name) for name in config.shape}
    sizes = [size for size in config.model if size <= config.devices]
    measure.heading(
        f"A decode step on {config.devices} devices like an {config.chip}, predicted",
        f"bf16, {config.rows} rows of {config.kv_seq} tokens on each group of devices, vendors' figures, nothing was run",
    )
    columns = ["model", "mesh", "weights GB", "cache GB", "fits", "collectives", "MB exchanged", "read ms", "wait ms"]
    rows = [line(name, shapes[name], size, config) for name in shapes for size in sizes]
    measure.table([*columns, "tok/s of all", "held whole"], rows)


if __name__ == "__main__":
    measure.run(main, Config)
