"""What a training run is told: its flags, each with a sentence, and what none of them may be."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import sae
from qwen_lab import bounds, files, flags, meshes, tracking, wording
from qwen_lab.bounds import Count, CountOrNone, Seed, Times, Weight, Whole
from qwen_lab.corpora import OfData, Unsaid
from qwen_lab.errors import InputError
from qwen_lab.hosts import Together

Form = Annotated[str, tyro.conf.arg(constructor=tyro.extras.literal_type_from_choices(list(sae.FORMS)))]


TASKS = Unsaid(120)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(meshes.OnMesh, OfData, Together):
    """What a training run is told."""

    source: Literal["live", "store"] = "live"
    """live: activations straight from the model; store: replayed from the shards of `extract.py`."""
    store: Path = Path("runs/extract")
    """Activation store, for --source store. A directory, or a URL such as s3://bucket/prefix."""
    partial_store: bool = False
    """Train on the shards that are there, of a store that is not finished."""
    form: Form = "topk"
    """Of the dictionary."""
    sweep: flags.Axes = ()
    """Axes such as k=8,16,32, layer=1,2,3 or mlp=0,1,2 (also lr, seed, sparsity, site); all combinations train at once on
    one pass. mlp=N is a transcoder of block N's MLP, mlp_in=N one that reads behind the MLP's norm, as published ones."""
    model: str = wording.MODEL
    """Embedded name, directory in Hugging Face's layout, or hub id. Live only."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, cache and activations. Live only."""
    tasks: str = wording.AUTO
    """Data set (arc-agi-1|2/training|evaluation, procedural), directory of {id}.json, Kaggle challenges file, or JSONL.
    auto: the procedural tasks that the model was trained for, or arc-agi-1/training. Live only."""
    limit: CountOrNone = TASKS
    """Tasks to take, from the first; None takes all. Held-out ones are among them. Of texts it counts documents, and all are
    taken unless it is given. Live only."""
    held_out: Count = 20
    """Of these the last so many are never trained on; the metrics at the end are theirs."""
    layer: Whole | None = None
    """Residual stream after this block. Without it the first of the late ones, or the store's first site. For the form skip
    it is the MLP of this block; clt has those of all blocks."""
    site: str | None = None
    """Any other place, as TransformerLens or Hugging Face spell it. For instance blocks.2.hook_mlp_out; A+B for two."""
    target_site: str | None = None
    """Site that a transcoder writes. With it one is trained, which predicts this later site from the one above."""
    max_prompt: flags.MaxPrompt = 1024
    """Prompt tokens at most: whole training pairs are left out to fit; None: what the model holds. Live only."""
    max_new_tokens: Count = 16
    """Tokens to generate at most. Live only."""
    encoder: str = wording.AUTO
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal)). auto: as trained.
    Live only."""
    prompt: str = wording.AUTO
    """Prompt format: a name of arc.PROMPTS. auto: as trained. Live only."""
    prompts: Count = 4
    """Prompts the model works on together."""
    d_sae: Count = 1024
    """Latents. Of a clt those of all blocks, equally many of each."""
    k: CountOrNone = None
    """Latents that fire per position. Exactly, on average or as a target, as the form's rule is; without it 16."""
    sparsity: Weight | None = None
    """Weight of the sparsity penalty; without it what suits the form."""
    bias_rate: float | None = None
    """How fast biases and thresholds move, over --lr; without it what suits the form."""
    steps: Count = 600
    """Optimizer steps. May be raised when a run goes on: from its last step it follows the schedule of the new length."""
    batch_size: Count = 512
    """Positions per step."""
    lr: float = 2e-3
    """Learning rate. Adam's warms up over a twentieth of the steps and falls to 0 over the last fifth."""
    product_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the operands of the dense products; sums are float32."""
    dead_after: Count = 50_000
    """Positions without firing after which a latent counts as dead and is offered what the others leave over."""
    sink_times: Times = 10.0
    """Leave out positions whose norm exceeds this many medians (attention sinks); 0 keeps all."""
    buffer_rows: Count = 49_152
    """Rows the shuffle buffer holds on the device."""
    steps_per_call: Count = 10
    """Steps per compiled call; checkpoints and the progress bar move by as many."""
    checkpoint_every: Count = 100
    """Steps between checkpoints; the last two are kept."""
    seed: Seed = 0
    """Of the run. First weights and shuffling are drawn from it."""
    track: tracking.Track = "none"
    """Send the numbers of metrics.jsonl there too, as they come. It must be installed."""
    out: Path = Path("runs/train_sae")
    """Directory of what is written. A run that was cut off, or is given higher --steps, goes on from its last checkpoint."""


def check(config: RunConfig) -> None:
    """Raises for values that no run can have."""
    bounds.check(config)
    tracking.check(config.track)
    form = form_of(config)
    uses_k = "k" in form.details or form.targets_l0
    if uses_k and k_of(config) > config.d_sae:
        raise InputError(f"--k: found {k_of(config)}, expected at most the {config.d_sae} latents of --d-sae")
    if config.k is not None and not uses_k:
        raise InputError(f"--k: found {config.k}, expected none: {config.form} has no k, --sparsity says how many fire")
    if not config.lr > 0 or not math.isfinite(config.lr):
        raise InputError(f"--lr: found {config.lr}, expected a finite number above 0")
    if config.bias_rate is not None and not 0 < config.bias_rate < math.inf:
        raise InputError(f"--bias-rate: found {config.bias_rate}, expected a finite number above 0")


def form_of(config: RunConfig) -> type[sae.AbstractDictionary]:
    """The class of the form asked for."""
    if config.form not in sae.FORMS:
        raise InputError(f"--form: found {config.form!r}, expected one of {', '.join(sae.FORMS)}")
    return sae.FORMS[config.form]


def k_of(config: RunConfig) -> int:
    """The k asked for, or else 16; forms that have none pass it over."""
    return 16 if config.k is None else config.k


EARLIER = files.jsonable(OfData())  # what runs that know none of these flags did
FREE = (  # change no result
    "out", "mesh", "checkpoint_every", "partial_store", "track", "coordinator", "processes", "process_id",
)  # fmt: skip
RAISABLE = ("limit", "steps")  # of what is settled: a run is extended by giving its command again with more


def settled(config: RunConfig) -> dict[str, Any]:
    """What a run may not change while it goes on, but for raising what is RAISABLE."""
    kept = {name: value for name, value in files.jsonable(config).items() if name not in FREE}
    return kept | {"k": k_of(config)}


LIVE = (
    *EARLIER,
    "model",
    "revision",
    "dtype",
    "tasks",
    "limit",
    "encoder",
    "prompt",
    "max_prompt",
    "max_new_tokens",
)  # what a store knows better


def training_flags(config: RunConfig) -> dict[str, Any]:
    """What a saved dictionary says of the flags it was trained with: those that its source reads."""
    unread = ("store",) if config.source == "live" else LIVE
    return {name: value for name, value in settled(config).items() if name not in unread}
