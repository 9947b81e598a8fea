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


SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Config:
    shape: tuple[str, ...] = tuple(f"Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"))
    """Presets' names, or `tiny`."""
    model: tuple[int, ...] = SIZES
    """Sizes of the model axis."""
    devices: tuple[int, ...] = SIZES
    """Devices in all, of which the data axis takes what the model axis leaves."""
    rows: int = 8
    """Sequences on each group of devices that holds the model once."""
    kv_seq: int = 2048
    """Tokens of each."""
    chips: tuple[str, ...] = ("h100", "v5e")
    """Devices: h100, a100 or v5e, by their vendors' figures."""


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


class Step(NamedTuple):
    """A decode step of one group of devices; groups of `data` know nothing of one another, so it is that of all."""

    weights: int  # bytes on each device
    cache: int
    exchanged: list[Collective]
    whole: list[str]  # what the size does not divide, so that every device holds all of it

    @classmethod
    def of(cls, config: QwenConfig, size: int, asked: Config) -> "Step":
        mesh = AbstractMesh((1, size), sharding.AXES)
        weights = sharding.bytes_per_device(skeleton(config, jnp.dtype(jnp.bfloat16)), mesh)
        share = sharding.share(config, mesh)
        cache = cache_bytes(share, batch=asked.rows, kv_seq=asked.kv_seq, dtype=jnp.bfloat16)
        whole = [said.partition("=")[0] for said in sharding.not_split(config, mesh)]
        return cls(weights, cache, collectives(config, mesh, asked.rows), whole)

    def fits(self, chip: Chip) -> bool:
        return self.weights + self.cache < 0.9 * chip.memory

    def seconds(self, chip: Chip, size: int) -> tuple[float, float]:
        """It reads its weights and its cache once, and waits for each collective."""
        return (self.weights + self.cache) / chip.read, sum(each.seconds(chip, size) for each in self.exchanged)


def of_sizes(steps: dict[tuple[str, int], Step], chips: dict[str, Chip]) -> list[list[object]]:
    """A row for each size of the model axis."""
    rows = []
    for (name, size), step in steps.items():
        moved = sum(each.bytes for each in step.exchanged)
        times = []
        for chip in chips.values():
            read, waited = step.seconds(chip, size)
            times += [f"{1e3 * read:.2f} + {1e3 * waited:.2f}" if step.fits(chip) else None]
        sizes = [f"{step.weights / 1e9:.2f}", f"{step.cache / 1e9:.2f}", len(step.exchanged), f"{moved / 1e6:.2f}"]
        rows.append([name, size, *sizes, *times, ", ".join(step.whole) or None])
    return rows


def of_devices(steps: dict[tuple[str, int], Step], chip: Chip, asked: Config) -> list[list[object]]:
    """For each model and number of devices the smallest model axis whose share fits, and what all devices write."""
    rows = []
    for name in asked.shape:
        cells: list[object] = [name]
        for devices in asked.devices:
            sizes = (size for size in sorted(asked.model) if devices % size == 0)
            size = next((size for size in sizes if steps[name, size].fits(chip)), None)
            if size is None:
                cells.append(None)
                continue
            seconds = sum(steps[name, size].seconds(chip, size))
            rate = asked.rows * (devices // size) / seconds
            cells.append(f"{devices // size} × {size}: {1e3 * seconds:.1f} ms, {rate:,.0f}")
        rows.append(cells)
    return rows


def main(config: Config) -> None:
    for name in config.chips:
        if name not in CHIPS:
            raise InputError(f"chips: found {name!r}, expected some of {', '.join(CHIPS)}")
    chips = {name: CHIPS[name] for name in config.chips}
    shapes = {name: measure.config_of(name) for name in config.shape}
    steps = {(name, size): Step.of(shapes[name], size, config) for name in shapes for size in config.model}
    measure.heading(
        "A decode step by the size of the model axis, predicted",
        f"bf16, {config.rows} rows of {config.kv_seq} tokens on each group of devices, vendors' figures, nothing was run",
    )
    times = [f"{name}: read + wait ms" for name in chips]
    columns = ["model", "model=", "weights GB", "cache GB", "collectives", "MB exchanged", *times, "held whole"]
    measure.table(columns, of_sizes(steps, chips))
    for name, chip in chips.items():
        said = f"{chip.memory / 1e9:.0f} GB a device; data × model: time of a step, tok/s of all; – fits on none"
        measure.heading(f"On so many devices like an {name}, predicted", said)
        measure.table(["model", *map(str, config.devices)], of_devices(steps, chip, config))


if __name__ == "__main__":
    measure.run(main, Config)
