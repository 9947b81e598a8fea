"""What keeping activations costs: extraction to disk beside the bare forward pass and transformers' hidden states."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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


def timings(model: Qwen, width: int, config: Config) -> tuple[float, float, Meter]:
    """Median seconds a token, bare and extracted, and the meter of the last extraction."""
    last = model.config.layers
    sites = Capture(layers=range(max(0, last - config.layers), last)).resolve(model.config)
    reader = Reader(model, sites, config.batch_tokens)
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
