"""What the TPU compiler says of programs for chips that are not here: memory, copies, collectives, bytes, roofline time.

    pip install 'jax[tpu]'                        # brings the compiler; no TPU is needed
    python benchmarks/tpu_plan.py --topologies v5e:2x2 v5e:4x4

Nothing is run: arguments are shapes, programs are only compiled.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

import measure
import sae
import scaling
from qwen_eqx import Capture, Generator, InputError, QwenConfig, sharding
from qwen_eqx.generation.options import Options
from qwen_eqx.generation.sample import Greedy, row_keys
from qwen_eqx.model.cache import KVCache
from qwen_eqx.weights.hf import skeleton
from sae import training
from sae.codes import across
from sae.training import loop
from sae.training import sharding as placing

FLOPS = {"v5e": 197e12}  # bfloat16 multiply-adds counted twice, by the vendor; bandwidths are `scaling.CHIPS`
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(")
COPY = re.compile(r"= (\S+) copy\(")
FETCH = re.compile(r"= \((\S+), .*\) copy-start\(")
ON_CHIP = re.compile(r"S\(\d+\)")
ARRAY = re.compile(rf"({'|'.join(BYTES)})\[([\d,]*)\]")
DESCRIBED = {  # what the compiler asks for on a machine that has no TPU
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}  # fmt: skip
Program = Literal["loop", "step", "topk"]


@dataclasses.dataclass(frozen=True)
class Config:
    shape: str = "Qwen2.5-0.5B"
    """A preset's name, `small` or `tiny`."""
    layers: int = 2
    """Of its layers, the first; 0 for all. Each of them compiles."""
    topologies: tuple[str, ...] = ("v5e:2x2", "v5e:4x4")
    """Chips and how they are wired."""
    programs: tuple[Program, ...] = ("loop", "step")
    """The whole decode loop of `generate`, one step of it, a training step of a TopK dictionary, which compiles long."""
    model: int = 2
    """Size of the model axis where weights are split."""
    rows: int = 8
    """Sequences on each group of chips that holds the model once."""
    prompt: int = 256
    """Tokens of each."""
    max_new_tokens: int = 256
    """Room for new tokens."""
    captured: int = 1
    """Layers whose activations are kept, the last ones; 0 for none."""
    d_sae: int = 4096
    """Latents of the dictionary."""
    k: int = 8
    """Of them on for each row; compiling takes longer the more there are."""
    dictionary_rows: int = 1024
    """Rows of a step on each group of chips that holds the dictionary once."""


class Report(NamedTuple):
    """What the compiler says of a program, for each chip."""

    arguments: int  # bytes
    outputs: int
    in_place: int  # of the outputs, in the arguments' place
    temporaries: int
    copies: list[int]  # bytes of each array that is copied within the chip's memory, small ones left out
    collectives: Counter[str]
    exchanged: int  # bytes, in all branches together
    moved: float  # bytes read and written; what is fetched ahead counts once
    flops: float

    @classmethod
    def of(cls, compiled: Any, *, least: int = 1_000_000) -> "Report":
        memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
        found = COLLECTIVE.findall(text)
        copied = [size_of(shape) for shape in COPY.findall(text) if not ON_CHIP.search(shape)]
        fetched = sum(size_of(shape) for shape in FETCH.findall(text) if ON_CHIP.search(shape))
        return cls(
            memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes,
            memory.temp_size_in_bytes, [size for size in copied if size >= least], Counter(kind for _, kind in found),
            sum(size_of(shape) for shape, _ in found), cost["bytes accessed"] - 2 * fetched, cost["flops"],
        )  # fmt: skip


def size_of(shape: str) -> int:
    """Bytes of the arrays of a shape as the compiler writes it."""
    arrays = ARRAY.findall(shape)
    return sum(BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size) for kind, sizes in arrays)


def chips(topology: str) -> list[Any]:
    """The devices of a topology, for which the compiler compiles although they are not here."""
    if topology.partition(":")[0] not in FLOPS:
        raise InputError(f"topologies: found {topology!r}, expected a chip of {', '.join(FLOPS)}, such as 'v5e:2x2'")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever the plugin raises
        said = str(error).splitlines()[0]
        raise InputError(f"topologies: found {topology!r}, which the TPU compiler refuses: {said}") from None


def meshes(config: Config) -> Iterator[tuple[str, Mesh]]:
    """Each topology with one chip of it, all chips over data, and `model` of them over model; one chip of a kind once."""
    seen = set[tuple[str, int, int]]()
    for topology in config.topologies:
        devices, kind = chips(topology), topology.partition(":")[0]
        for data, model in ((1, 1), (len(devices), 1), (len(devices) // config.model, config.model)):
            name = kind if data * model == 1 else topology
            if data and (name, data, model) not in seen:
                seen.add((name, data, model))
                auto = (AxisType.Auto, AxisType.Auto)
                grid = np.array(devices[: data * model]).reshape(data, model)
                yield topology, Mesh(grid, sharding.AXES, axis_types=auto)


def compiled(program: Program, mesh: Mesh, config: Config) -> Any:
    """The compiled program, its state donated. Choices that look at the default backend are told that it is a TPU."""
    with mock.patch.object(jax, "default_backend", return_value="tpu"):
        lowered = dictionary_step(mesh, config) if program == "topk" else decoding(program, mesh, config)
        return lowered.compile()


def decoding(program: Program, mesh: Mesh, config: Config) -> Any:
    """One step of `generate`, or its loop."""
    shape = shape_of(config)
    model = skeleton(shape, jnp.dtype(jnp.bfloat16))
    model = placed(model, sharding.shardings(model, mesh))
    layers = range(shape.layers - min(config.captured, shape.layers), shape.layers)
    options = Options(max_new_tokens=config.max_new_tokens, capture=Capture(layers=layers) if layers else None)
    generator = Generator(Greedy(), (), options.settings(model, config.prompt))
    batch, settings = config.rows * mesh.shape["data"], generator.settings

    def empty() -> Any:
        cache = KVCache.init(shape, batch=batch, kv_seq=settings.kv_seq, dtype=settings.cache_dtype)
        keys = row_keys(None, np.zeros(batch, np.int64), np.zeros(batch, np.int64))
        return generator.empty(model, cache, jnp.zeros(batch, jnp.int32), keys, None)

    made = jax.jit(empty).lower().compile().output_shardings  # where `generate` has it
    call = generator.step if program == "step" else generator.loop
    return jax.jit(call, donate_argnums=1).lower(model, placed(jax.eval_shape(empty), made))


def dictionary_step(mesh: Mesh, config: Config) -> Any:
    """One step of `training.run` with a TopK dictionary, bfloat16 products."""
    told = training.TrainConfig(steps=10, product_dtype="bfloat16")
    rows, width = config.dictionary_rows * mesh.shape["data"], shape_of(config).d_model

    def init() -> Any:
        module = sae.TopK.init(d_model=width, d_sae=config.d_sae, k=config.k, key=jax.random.key(0))
        return training.init(module, told, jnp.ones((2, width), jnp.float32))

    state = eqx.filter_eval_shape(init)
    state = placed(state, placing.shardings(state, mesh))
    x = jax.ShapeDtypeStruct((1, rows, width), jnp.float32, sharding=across.by_rows(mesh, rows, 1))

    def run(state: Any, x: Any) -> Any:
        return loop._run(loop.Batches(told, x, None, None, None, mesh), state)

    with jax.set_mesh(mesh):
        return jax.jit(run, donate_argnums=0).lower(state, x)


def shape_of(config: Config) -> QwenConfig:
    shape = measure.config_of(config.shape)
    return dataclasses.replace(shape, layers=min(config.layers or shape.layers, shape.layers))


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes that lie where the shardings say."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings)


def line(topology: str, program: Program, mesh: Mesh, config: Config) -> list[object]:
    """A row of the table."""
    kind, size = topology.partition(":")[0], mesh.size
    measure.say(f"{program}, {topology}, {sharding.describe(*mesh.shape.values())}")
    report = Report.of(compiled(program, mesh, config))
    chip = scaling.CHIPS[kind]
    seconds = max(report.moved / chip.read, report.flops / FLOPS[kind])
    sizes = [report.arguments, report.outputs, report.in_place, report.temporaries]
    copies = " + ".join(f"{size / 1e6:,.1f}" for size in report.copies) or None
    exchanged = ", ".join(f"{count} {name}" for name, count in sorted(report.collectives.items())) or None
    once = program != "loop"  # of a loop the compiler counts one turn, or as many as it knows of
    return [program, topology if size > 1 else kind, sharding.describe(*mesh.shape.values()),
            *(f"{size / 1e6:,.1f}" for size in sizes), copies, exchanged, f"{report.exchanged / 1e6:.2f}",
            f"{report.moved / 1e6:,.0f}" if once else None, f"{1e3 * seconds:.2f}" if once else None,
            f"{1e3 * report.arguments / chip.read:.2f}"]  # fmt: skip


def main(config: Config) -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu: not installed, expected the TPU compiler: pip install 'jax[tpu]'")
    jax.config.update("jax_platforms", "cpu")  # or it looks for a TPU
    for name, value in DESCRIBED.items():
        os.environ.setdefault(name, value)
    rows = []
    for topology, mesh in meshes(config):
        for program in config.programs:
            if program != "topk" or mesh.size == 1 or mesh.shape["model"] > 1:  # each takes longer than all of decoding
                rows.append(line(topology, program, mesh, config))
    shape = shape_of(config)
    measure.heading(
        "What the TPU compiler plans for each chip",
        f"{config.shape} with {shape.layers} layers, bf16, {config.rows} rows of {config.prompt} + {config.max_new_tokens} "
        f"tokens a group, {config.captured} layers kept; TopK {shape.d_model} -> {config.d_sae:,}, k {config.k}, "
        f"{config.dictionary_rows:,} rows a group; libtpu {importlib.metadata.version('libtpu')}; nothing was run",
    )
    columns = ["program", "chips", "mesh", "arguments MB", "outputs MB", "in place MB", "temporaries MB", "copies MB"]
    measure.table(
        [*columns, "collectives", "MB exchanged", "MB accessed", "roofline ms", "arguments read once ms"], rows
    )


if __name__ == "__main__":
    measure.run(main, Config)
