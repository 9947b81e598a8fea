"""What keeping activations costs: extraction to disk beside the bare forward pass and transformers' hidden states.

And what reading them back does: rows a second, and the share of a dictionary's steps that waits for them.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import measure
import sae
from qwen_eqx import Capture, Qwen, from_pretrained
from qwen_lab.choosing import Choice
from qwen_lab.extraction import Extraction
from qwen_lab.meter import Meter
from qwen_lab.passages import Passage
from qwen_lab.reading import Reader
from qwen_lab.writing import Background, Shards
from sae import training


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "Qwen2.5-0.5B"
    """A preset's name, or `tiny`."""
    dtype: str = "bfloat16"
    """Of weights, residual stream and what is stored."""
    prompts: tuple[int, ...] = (256, 1024, 4096)
    """Tokens of an item."""
    layers: int = 14
    """Layers captured, the last ones."""
    batch_tokens: int = 2048
    """Tokens read together; a longer item is read alone."""
    batches: int = 4
    """Batches of a timing, each of which fills a shard."""
    repeats: int = 3
    """Timings without and with extraction, in turn; medians are shown."""
    d_sae: int = 8192
    """Latents of the TopK dictionary that is trained on what was kept at the last site."""
    rows: int = 1024
    """Rows of a batch that is read back, in a shuffled order."""
    steps: int = 16
    """Batches read back, and steps of the dictionary."""
    work: Path | None = None
    """Directory in which stores are written and removed; the system's for temporary files unless given."""
    peer_python: Path | None = None
    """A Python with torch and transformers, to be measured in the same run."""


def main(config: Config) -> None:
    shape = measure.config_of(config.shape)
    asked = {"dtype": config.dtype, "batches": [1], "prompts": config.prompts, "steps": 0, "repeats": 2, "hidden": True}
    theirs = measure.peer(config.peer_python, shape, **asked)
    model, rows = measure.random_model(shape, config.dtype), []
    for number, width in enumerate(config.prompts):
        measure.say(f"{width} tokens")
        bare, whole, meter = timings(model, width, config)
        peer = theirs["rows"][number]["hidden_ms"] / 1e3 / width if theirs else None
        line = meter.line
        row = [width, f"{1 / bare:,.0f}", f"{1 / whole:,.0f}", f"{bare / whole:.1%}", f"{line['share_writing']:.0%}"]
        row += [f"{line['bytes'] / line['seconds'] / 1e6:,.1f}", None if peer is None else f"{1 / peer:,.0f}"]
        rows.append([*row, measure.ratio(whole, peer)])
    details = (
        f"{config.shape}, {config.dtype}, {config.layers} layers kept, about {config.batch_tokens} tokens together"
    )
    measure.heading("Extraction", f"{details}, random weights")
    print(f"Peer: {theirs['versions'] if theirs else 'not asked for (--peer-python)'}, batch 1, nothing written.\n")
    columns = ["tokens", "bare tok/s", "extraction tok/s", "of bare", "writing beside", "MB/s"]
    measure.table([*columns, "transformers tok/s", "× transformers' time"], rows)
    measure.say("reading back")
    measure.heading(
        "Reading back", f"{config.shape}, {config.dtype}, one site of {config.layers}, TopK of {config.d_sae}"
    )
    columns = [
        "rows of a batch",
        "read and put on the device, rows/s",
        "with steps, rows/s",
        "of a step waiting for rows",
    ]
    measure.table(columns, [read_back(model, config)])


def timings(model: Qwen, width: int, config: Config) -> tuple[float, float, Meter]:
    """Median seconds a token, bare and extracted, and the meter of the last extraction."""
    reader = reader_of(model, config)
    together = reader.rows(reader.width(width))
    items = measure.random_prompts(model.config, together * config.batches, width)
    batches = [jnp.asarray(part) for part in items.reshape(config.batches, together, width)]
    bare, whole = [], []
    meter = Meter(1)
    for _ in range(config.repeats + 1):
        begin = time.perf_counter()
        for batch in batches:
            jax.block_until_ready(_bare(model, batch))
        bare.append(time.perf_counter() - begin)
        with tempfile.TemporaryDirectory(dir=config.work) as directory:
            passages = ((number, _passage(tokens.tolist())) for number, tokens in enumerate(items))
            begin = time.perf_counter()
            meter = extract(reader, passages, sae.Plan(len(items), together), Path(directory))
            whole.append(time.perf_counter() - begin)
    per_token = [statistics.median(each[1:]) / items.size for each in (bare, whole)]  # the first ones compile
    return per_token[0], per_token[1], meter


def reader_of(model: Qwen, config: Config) -> Reader:
    last = model.config.layers
    sites = Capture(layers=range(max(0, last - config.layers), last)).resolve(model.config)
    return Reader(model, sites, config.batch_tokens)


def read_back(model: Qwen, config: Config) -> list[object]:
    """A line of the table, of a store of the shortest items."""
    reader, width = reader_of(model, config), min(config.prompts)
    together = reader.rows(reader.width(width))
    items = measure.random_prompts(model.config, max(together, 2 * -(-config.rows // width)), width)
    with tempfile.TemporaryDirectory(dir=config.work) as directory:
        passages = ((number, _passage(tokens.tolist())) for number, tokens in enumerate(items))
        extract(reader, passages, sae.Plan(len(items), together), Path(directory))
        store = sae.ActivationStore.open(Path(directory) / "store")
        store = store.select(store.sites[-1])
        alone = _alone(_batches(store, config), config)
        both, waited = _trained(_batches(store, config), config)
    rates = [f"{config.rows * config.steps / seconds:,.0f}" for seconds in (alone, both)]
    return [config.rows, *rates, f"{waited / both:.1%}"]


def _batches(store: sae.ActivationStore, config: Config) -> Iterator[Any]:
    """Whole batches of one site's rows on the device, without end."""
    drawn = (each.rows.activations[:, 0] for each in sae.shuffled(store, config.rows, epochs=None))
    return sae.prefetched(rows for rows in drawn if len(rows) == config.rows)


def _alone(batches: Iterator[Any], config: Config) -> float:
    """Seconds in which the batches come where nothing else is done; the first one looks at every byte of its shards."""
    next(batches)
    begin = time.perf_counter()
    for _ in range(config.steps):
        jax.block_until_ready(next(batches))
    return time.perf_counter() - begin


def _trained(batches: Iterator[Any], config: Config) -> tuple[float, float]:
    """Seconds of a dictionary's steps, and those of them in which it waited for rows; the first step compiles."""
    first = next(batches)
    module = sae.TopK.init(d_model=first.shape[1], d_sae=config.d_sae, k=min(32, config.d_sae), key=jax.random.key(0))
    told = training.TrainConfig(steps=config.steps + 1)
    waits = [0.0]

    def watched() -> Iterator[Any]:
        yield first
        for _ in range(config.steps):
            begin = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - begin)
            yield batch

    steps = training.fit(training.init(module, told, first.astype(jnp.float32)), watched(), told)
    jax.block_until_ready(next(steps))
    begin = time.perf_counter()
    for each in steps:
        jax.block_until_ready(each)
    return time.perf_counter() - begin, sum(waits)


def _passage(tokens: list[int]) -> Passage:
    return Passage(tokens, {"text": "", "outcome": "text"})


def extract(reader: Reader, passages: Iterator[tuple[int, Passage]], plan: sae.Plan, directory: Path) -> Meter:
    """All passages into a new store."""
    manifest = sae.Manifest(
        model_id="random", revision=None, config_digest="-", tokenizer_digest="-",
        sites=tuple(map(str, reader.sites)), dtype=reader.model.dtype.name, d_model=reader.model.config.d_model,
        seed=0, plan=plan, config={}, versions={},
    )  # fmt: skip
    writer = sae.StoreWriter.create(directory / "store", manifest)
    meter = Meter(1)
    with Background(writer.write_shard, meter) as background:
        shards = Shards(writer, write=background.put)
        Extraction(reader, from_pretrained("tiny-random")[1], Choice(), shards, meter, lambda *_: None).forward(
            passages
        )
    return meter


@jax.jit
def _bare(model: Qwen, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq d_model"]:
    return model.read(tokens)


if __name__ == "__main__":
    measure.run(main, Config)
