"""Keep what a model computes while it reads or answers: safetensors shards with a manifest, ready for SAE training.

Without flags: the embedded demo model answers six tasks of ARC-AGI-1. `--model Qwen/Qwen2.5-0.5B-Instruct` loads a real
one. `--mode forward` reads given tokens at once, the fast way to data for dictionaries: ARC tasks with their answers, or
with `--data texts.jsonl` any text.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import qwen_eqx
import sae
from qwen_lab import (
    bounds,
    claims,
    cli,
    corpora,
    files,
    flags,
    locks,
    meshes,
    passages,
    places,
    provenance,
    rows,
    space,
    stopping,
    store_report,
    tracking,
    wording,
)
from qwen_lab.bounds import Count, CountOrNone, Seed, Times
from qwen_lab.choosing import NEED_MARKS, Choice, Positions
from qwen_lab.corpora import OfData, Unsaid
from qwen_lab.errors import InputError
from qwen_lab.extraction import Extraction
from qwen_lab.hosts import Hosts, OfHosts
from qwen_lab.locks import Share
from qwen_lab.meter import Meter
from qwen_lab.passages import Corpus, Index, Passage
from qwen_lab.reading import Reader
from qwen_lab.writing import Background, Shards
from sae import files as sae_files
from sae import storage
from sae.data.plan import PLACES

# what a run may be gone on with differently
FREE = ("out", "mesh", "batch_size", "workers_of", "verify", "track", "coordinator", "processes", "process_id")
FEW = Unsaid(6)
GRACE = 23.0  # seconds from a signal to the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(meshes.OnMesh, OfData, OfHosts):
    model: str = wording.MODEL
    """Embedded name, directory in Hugging Face's layout, or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tasks: str = wording.AUTO
    """Data set (arc-agi-1|2/training|evaluation, procedural), directory of {id}.json, Kaggle challenges file, or JSONL.
    auto: the procedural tasks that the model was trained for, or arc-agi-1/training."""
    limit: CountOrNone = FEW
    """Tasks to take, from the first; None takes all. Of texts it counts documents, and all are taken unless it is given."""
    layers: flags.Blocks = "late"
    """Residual stream after these blocks: `10:24`, `3,5,7`, `all`, or `late` for the last three fifths. Or `none`."""
    sites: flags.Sites = ()
    """Further places, as TransformerLens or Hugging Face spell them: blocks.1.hook_resid_mid,blocks.1.hook_mlp_out."""
    positions: Positions = "all"
    """Positions that become rows: all, those whose logits chose (or are to choose) a token of the answer, the prompt's, or
    those that stand in a cell of any grid or of the test input."""
    exclude_tokens: flags.Words = ()
    """Ids of tokens whose positions are left out."""
    sink_times: Times = 0.0
    """Leave out positions whose norm exceeds this many medians (attention sinks); 0 keeps all. Medians are of an item."""
    sample_rows: float = 1.0
    """Fraction of the positions left that is kept of each item. Which ones follows from the seed and the item."""
    max_new_tokens: Count = 64
    """Tokens to generate at most. ARC answers in Qwen tokens have 179 on average and 1,022 at most."""
    batch_size: Count = 4
    """Prompts generated together."""
    batch_tokens: Count = 2048
    """Tokens read together with --mode forward. A batch holds as many items of one length as that makes, at least one."""
    items_per_shard: Count = 8
    """Items in one shard file. An item is a test input, or a document or a part of one."""
    encoder: str = wording.AUTO
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal)). auto: as trained."""
    prompt: str = wording.AUTO
    """Prompt format: a name of arc.PROMPTS. auto: as trained."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, cache and activations."""
    seed: Seed = 0
    """Of the run. Greedy decoding draws nothing; --sample-rows does."""
    track: tracking.Track = "none"
    """Send the numbers of metrics.jsonl there too, as they come. It must be installed."""
    verify: bool = False
    """Hash every shard that stands, and make the damaged ones again."""
    out: Path = Path("runs/extract")
    """Directory of what is written. A store that was cut off, or is given a higher --limit, goes on where it stopped. Or a
    URL such as s3://bucket/prefix; what else a run writes then lies in runs/."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run reads, with which model, and which rows of it are kept."""

    config: Config
    model: qwen_eqx.Qwen
    tokenizer: qwen_eqx.Tokenizer
    capture: qwen_eqx.Capture
    choice: Choice
    corpus: Corpus
    index: Index
    share: Share | None
    hosts: Hosts | None  # this process and its fellows

    @property
    def forward(self) -> bool:
        return self.config.mode == "forward"

    @property
    def home(self) -> Path | str:
        """Where the store is."""
        return files.location(self.config.out)

    @property
    def beside(self) -> Path:
        """Where on this machine the run says of itself what it does."""
        return files.beside(self.config.out)

    @property
    def new(self) -> int:
        """Tokens that an item may have beside its own: the last one generated is never read."""
        return 0 if self.forward else self.config.max_new_tokens - 1


def main(config: Config) -> None:
    job = plan(config)
    config, manifest = job.config, planned(job)
    if job.hosts is not None:
        cli.console.print(
            f"process {job.hosts.number} of {job.hosts.processes}, waiting for all at {job.hosts.coordinator}"
        )
        told = {**sae_files.flatten(manifest.to_json()), "git_revision": provenance.git_revision()}
        job.hosts.agree(told, job.home)
    with locks.claimed(job.beside, job.share), claims.claimed(job.home, job.share), stopping.within(GRACE):
        with ExitStack() as alone:
            if job.share is not None:
                alone.enter_context(locks.turn(job.beside))
                alone.enter_context(claims.turn(job.home))
            writer = open_store(job, manifest)
        speed = fill(job, writer)
    cli.console.print(store_report.table(job.home, speed, verify=config.verify))
    if writer.missing:
        cli.console.print(f"{len(writer.missing)} shards are missing: of others at work, or given again it makes them")
    cli.console.print(f"next: python experiments/train_sae.py --source store --store {job.home}", markup=False)


def plan(config: Config) -> Job:
    """Everything that is known before the first byte is written; wrong flags and data raise here."""
    bounds.check(config)
    tracking.check(config.track)
    share, found = None if config.workers_of is None else Share.parse(config.workers_of), Hosts.of(config)
    if found is not None:
        share = Share(found.number + 1, found.processes)
    model, tokenizer = config.open_model(config.model, config.dtype, config.revision)
    config = corpora.resolved(wording.filled(config, tokenizer), model.config)
    excluded = tuple(int(word) if word.isdecimal() else tokenizer.token_to_id(word) for word in config.exclude_tokens)
    choice = Choice(config.positions, excluded, config.sink_times, config.sample_rows, config.seed)
    if config.positions in NEED_MARKS and corpora.reads_texts(config):
        raise InputError(f"--positions {config.positions}: found texts, expected ARC tasks: texts have no cells")
    layers = [] if config.layers == "none" else places.parse_layers(config.layers, model.config.layers)
    capture = qwen_eqx.Capture(layers=layers, sites=config.sites)
    capture.resolve(model.config)  # raises now for a site that cannot be captured
    room = config.context_length if config.mode == "forward" else model.config.max_seq - config.max_new_tokens
    corpus = corpora.corpus(config, tokenizer, min(room, config.context_length))
    cli.say_what_a_demo_is(config.model)
    return Job(config, model, tokenizer, capture, choice, corpus, look_through(config, corpus, tokenizer), share, found)


def settled(config: Config) -> dict[str, Any]:
    """The flags that must agree for a run to go on."""
    return {name: value for name, value in files.jsonable(config).items() if name not in FREE}


def look_through(config: Config, corpus: Corpus, tokenizer: qwen_eqx.Tokenizer) -> Index:
    """One pass over the data; an item that is another one than in the store that stands there is named."""
    home = files.location(config.out)
    there, committed = sae.Manifest.there(home), {}
    if there is not None and not config.verify:
        asked = settled(config) | {"limit": there.config.get("limit")}
        if there.config == asked and there.tokenizer_digest == f"sha256:{tokenizer.digest}":
            committed = sae.ActivationStore.open(home).items  # else the writer says in what the runs differ
    with cli.bar(None, "looking through the data", "items") as advance:

        def seen(number: int, passage: Passage) -> None:
            check_same_item(config, number, passage, committed.get(number, {}))
            advance(1)
            stopping.check()

        return Index.of(corpus, config.items_per_shard, 0 if there is None else there.plan.items, seen)


def check_same_item(config: Config, number: int, passage: Passage, said: Mapping[str, Any]) -> None:
    """Raises if a store holds another item of this number than the data do now."""
    if said.get("digest", passage.digest) == passage.digest:
        return
    found, expected = passage.name, passages.named(said)
    if found == expected:
        found, expected = f"{found} with other tokens", f"{expected} as it was"
    flag = "--data" if config.data else "--tasks"
    where = f"the store {files.location(config.out)}"
    raise InputError(f"{flag}: found {found} as item {number}, expected {expected} in {where}")


def planned(job: Job) -> sae.Manifest:
    """What the store of this run is to hold."""
    config, index = job.config, job.index
    columns = () if corpora.reads_texts(config) else PLACES
    origin = rows.Origin(
        config.model, config.revision, config.dtype, config.seed, settled(config), columns, index.digest
    )
    return rows.manifest(job.model, job.tokenizer, job.capture, index.plan, origin)


def open_store(job: Job, manifest: sae.Manifest) -> sae.StoreWriter:
    """The store of this run, new or gone on with; damaged shards are missing again with --verify."""
    there = sae.Manifest.there(job.home)
    if job.config.verify and there is not None and _same_but_longer(there, manifest):
        for shard, problem in sae.StoreWriter.take_back_damaged(job.home).items():
            cli.console.print(f"shard {shard} is made again: {problem}", markup=False)
    writer = rows.writer(job.home, manifest, next(iter(job.index.digests.values()), ""))
    provenance.record_run(job.beside, job.config)
    if isinstance(job.home, str):
        (storage.place(job.home) / "run.json").put((job.beside / "run.json").read_bytes())
    return writer


def _same_but_longer(there: sae.Manifest, here: sae.Manifest) -> bool:
    """Whether a store is this run's, begun perhaps with a lower --limit; of another run's nothing is taken back."""
    config = there.config | {"limit": here.config["limit"]}
    longer = dataclasses.replace(there, config=config, plan=here.plan, items_digest=here.items_digest)
    return not longer.differences(here)


def fill(job: Job, writer: sae.StoreWriter) -> str:
    """Every shard that is missing of this process's share; says how fast that was."""
    config = job.config
    todo = writer.missing if job.share is None else job.share.of_plan(writer.plan, writer.missing)
    if len(writer.missing) < writer.plan.shards:
        cli.console.print(f"going on: {len(writer.missing)} of {writer.plan.shards} shards are missing")
    cli.console.print(space.check(job.home, writer.manifest, job.index, todo, job.choice, job.new), markup=False)
    if not job.forward:
        cli.console.print(f"memory beside the weights, at most: {memory(job)}")
    tokens = sum(job.index.tokens[shard] for shard in todo)
    if not todo:
        return ""
    suffix = "" if job.share is None else job.share.suffix
    with tracking.Log(job.beside, config.track, config, share=suffix) as log:
        meter = Meter(tokens, log.add)
        work(job, writer, todo, meter)
        meter.record(now=True)
    return meter.note


def work(job: Job, writer: sae.StoreWriter, todo: Sequence[int], meter: Meter) -> None:
    """Reads, computes and writes these shards."""
    config, longest = job.config, job.index.longest
    reader = Reader(job.model, job.capture.resolve(job.model.config), config.batch_tokens if job.forward else 1)
    reader.check_room(longest + job.new)
    items = sum(len(writer.plan.items_of(shard)) for shard in todo)
    with (
        cli.bar(items, "reading" if job.forward else "generating", "items") as advance,
        Background(writer.write_shard, meter) as background,
    ):
        shards = Shards(writer, todo, background.put)
        extraction = Extraction(reader, job.tokenizer, job.choice, shards, meter, advance)
        arriving = job.index.read(job.corpus, todo)
        if job.forward:
            extraction.forward(arriving)
        else:
            slots = config.batch_size
            extraction.generate(arriving, slots=slots, max_new_tokens=config.max_new_tokens, longest=longest)


def memory(job: Job) -> qwen_eqx.MemoryPlan:
    """What the slots allocate, known before they do."""
    config, model = job.config, job.model.config
    width = qwen_eqx.prompt_width(job.index.longest)
    return qwen_eqx.MemoryPlan.of(
        model, batch=config.batch_size, kv_seq=width + config.max_new_tokens, cache_dtype=config.dtype
    )


if __name__ == "__main__":
    cli.run(main, Config)
