"""What a run that trains a model is told: its flags, and what they make."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import qwen_eqx
from qwen_eqx import training
from qwen_eqx.weights import hub
from qwen_lab import bounds, files, flags, lessons, meshes, tracking
from qwen_lab.bounds import Count, Seed, Weight, Whole
from qwen_lab.errors import InputError
from qwen_lab.hosts import Together

HELD_OUT_FAMILIES = ("panel_xor", "kaleidoscope", "crop_largest", "swap_colours")


@dataclasses.dataclass(frozen=True)
class LMConfig(meshes.OnMesh, Together):
    """What a run that trains a model is told."""

    init: str | None = None
    """Model to go on from: embedded name, directory or hub id; without it random weights of the shape below."""
    tokenizer: str = "tiny-random"
    """Where the tokenizer of a model with random weights lies: embedded name, directory or hub id."""
    blocks: Count = 6
    """Blocks of the decoder."""
    d_model: Count = 128
    """Width of the residual stream."""
    heads: Count = 4
    """Query heads of each block; a head is d_model / heads wide."""
    kv_heads: Count = 2
    """Key and value heads, each shared by heads / kv_heads query heads."""
    d_ff: Count = 384
    """Neurons of each block."""
    lora_rank: Whole = 0
    """Train LoRA of this rank beside the frozen matrices, merged on saving; 0 trains everything."""
    families: flags.Words = ()
    """Families of procedural tasks. Without it all but the held-out ones; one named twice is drawn twice as often."""
    held_out_families: flags.Words = HELD_OUT_FAMILIES
    """Families that are never trained on, and measured apart."""
    sides: flags.Sides = (3, 6)
    """Smallest and largest side of the procedural grids."""
    encoder: str = "padded(6)"
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal))."""
    prompt: str = "compact"
    """Prompt format: a name of arc.PROMPTS."""
    turned: float = 0.5
    """Share of the tasks that are turned or mirrored."""
    small: float = 0.5
    """Share of the tasks whose largest side is drawn anew from the sides, so that small grids are frequent."""
    tasks: str = "arc-agi-1/training"
    """Data set (arc-agi-1|2/training|evaluation, procedural), directory of {id}.json, Kaggle challenges file, or JSONL.
    Not procedural, whose tasks measure; read where `--tasks-share` is above 0."""
    tasks_share: float = 0.0
    """Share of the documents that are tasks of that data set, as far as they fit the context, augmented at each draw."""
    learn: Literal["answer", "outputs", "all"] = "outputs"
    """Tokens that weigh in the loss: the test's output, all outputs, or everything."""
    context_length: Count = 360
    """Tokens of a document at most."""
    steps: Count = 4000
    """Optimizer steps."""
    batch_size: Count = 32
    """Documents of one gradient."""
    accumulate: Count = 1
    """Gradients summed for one step."""
    lr: float = 2e-3
    """Learning rate. It warms up, and falls to a tenth along a cosine."""
    warmup: Whole = 100
    """Steps of the warm-up."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Muon moves the blocks' matrices, AdamW the rest."""
    weight_decay: Weight = 0.01
    """Of matrices."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, cache and activations. Of the computation: master weights are float32."""
    remat: bool = False
    """Compute the inside of blocks again for the gradient: less memory, a third more time."""
    steps_per_call: Count = 10
    """Steps per compiled call; checkpoints and the progress bar move by as many. Fewer where the next step is wider."""
    checkpoint_every: Count = 200
    """Steps between checkpoints; the last two are kept."""
    eval_every: Count = 200
    """Steps between measurements on held-out tasks."""
    eval_tasks: Count = 8
    """Held-out tasks of each family that are measured while training."""
    workers: Whole = 1
    """Processes that make tasks beside; 0 makes them in this one."""
    seed: Seed = 0
    """Of the run. The first weights and the order of the tasks come from it."""
    track: tracking.Track = "none"
    """Send the numbers of metrics.jsonl there too, as they come. It must be installed."""
    out: Path = Path("runs/train_lm")
    """Directory of what is written. A run that was cut off goes on where its last checkpoint stands."""


# change no result
FREE = (
    "out", "mesh", "checkpoint_every", "eval_every", "eval_tasks", "steps_per_call", "workers", "track",
    "coordinator", "processes", "process_id",
)  # fmt: skip


def check(config: LMConfig) -> None:
    """Raises for values that no run can have."""
    bounds.check(config)
    tracking.check(config.track)
    least, most = config.sides
    if not 1 <= least <= most <= 30:
        raise InputError(f"--sides: found {least} {most}, expected two numbers from 1 to 30, the smaller one first")
    for name in ("turned", "small"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"--{name}: found {getattr(config, name)}, expected 0 to 1")
    if not 0 <= config.tasks_share < 1:
        raise InputError(f"--tasks-share: found {config.tasks_share}, expected at least 0 and less than 1")
    train_config(config)


def settled(config: LMConfig) -> dict[str, Any]:
    """What a run may not change while it goes on."""
    return {name: value for name, value in files.jsonable(config).items() if name not in FREE}


def train_config(config: LMConfig) -> training.TrainConfig:
    return training.TrainConfig(
        steps=config.steps,
        learning_rate=config.lr,
        warmup_steps=min(config.warmup, config.steps),
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        dtype=config.dtype,
        remat=config.remat,
    )


def course(config: LMConfig) -> lessons.Course:
    return lessons.Course(
        tokenizer=config.init or config.tokenizer,
        families=lessons.families(config.families, config.held_out_families),
        sides=config.sides,
        encoder=config.encoder,
        format=config.prompt,
        context=config.context_length,
        seed=config.seed,
        turned=config.turned,
        small=config.small,
        tasks=config.tasks,
        tasks_share=config.tasks_share,
        learn=config.learn,
    )


def start(config: LMConfig, mesh: Mesh | None = None) -> tuple[qwen_eqx.Qwen, qwen_eqx.Tokenizer]:
    """The model before its first step, in float32, and its tokenizer."""
    if config.init is not None:
        model, tokenizer = qwen_eqx.from_pretrained(config.init, dtype=jnp.float32, mesh=mesh)
    else:
        tokenizer = qwen_eqx.Tokenizer.from_directory(hub.locate(config.tokenizer))
        model = qwen_eqx.Qwen.init(shape(config, tokenizer), key=jax.random.key(config.seed), dtype=jnp.float32)
    if config.lora_rank:
        model = training.LoRA.wrap(model, rank=config.lora_rank, key=jax.random.key(config.seed))
    return model, tokenizer


def shape(config: LMConfig, tokenizer: qwen_eqx.Tokenizer) -> qwen_eqx.QwenConfig:
    """A Qwen3 of the width, depth and heads asked for."""
    if config.d_model % config.heads or (config.d_model // config.heads) % 2:
        raise InputError(
            f"--heads: found {config.heads}, expected a divisor of d_model={config.d_model} with even heads"
        )
    return qwen_eqx.QwenConfig(
        model_type="qwen3",
        vocab=tokenizer.largest_id + 1,
        d_model=config.d_model,
        layers=config.blocks,
        heads=config.heads,
        kv_heads=config.kv_heads,
        d_head=config.d_model // config.heads,
        d_ff=config.d_ff,
        max_seq=32768,
        rope_theta=10_000.0,
        tied=True,
    )
