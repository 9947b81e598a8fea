"""From a data set to features in one command: transform, extract, train, evaluate, and a page that links all of it.

`--STAGE.FLAG` is a flag of a stage's own command (`--train.steps 100`), `--STAGE.help` lists them: transform is
`transform_dataset.py`, extract `extract.py`, train `train_sae.py`, evaluate `evaluate_sae.py`. `--config FILE.toml` holds
them in tables, `[train]` `steps = 100`. OUT/STAGE stands for the directory of a stage. Without flags: the embedded model on
its own tasks, a few minutes. A stage that is whole is skipped; one that was cut off goes on.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import arc
import evaluate_sae
import extract
import qwen_eqx
import sae
import train_sae
import transform_dataset
from arc.records import STREAMED, iter_records
from qwen_eqx.weights import hub
from qwen_lab import (
    bounds,
    cli,
    files,
    flags,
    loading,
    locks,
    meshes,
    pipeline_report,
    places,
    provenance,
    recipes,
    settings,
    stages,
    sweeps,
    tracking,
    wording,
)
from qwen_lab.errors import InputError
from qwen_lab.settings import RunConfig
from qwen_lab.stages import Basis

Part = (tyro.conf.Fixed, tyro.conf.Suppress)  # its flags are read by `told`
Extract = extract.Config  # inside the class below `extract` is a field
STORE, SAES, TASKS = "OUT/extract", "OUT/train/sae", "OUT/transform/challenges.json"
RECIPE, PAGE = "pipeline.toml", "index.html"


@dataclasses.dataclass(frozen=True)
class Config(meshes.OnMesh):
    config: Path | None = None
    """TOML file of flags: a table for each stage, before them those of this command. The command line wins."""
    stages: flags.Words = ("transform", "extract", "train", "evaluate", "report")
    """Stages to work on. What a later one reads of those that are left out must be there."""
    track: tracking.Track = "none"
    """Send the numbers of metrics.jsonl there too, as they come. It must be installed. Of every stage."""
    out: Path = Path("runs/pipeline")
    """Directory of what is written. A run that was cut off goes on where it stopped; index.html is the page."""
    transform: Annotated[transform_dataset.Config, *Part] = dataclasses.field(
        default_factory=lambda: transform_dataset.Config(dataset="", out=Path("OUT/transform"))
    )
    """Flags of transform_dataset.py; without a data set there is nothing to transform."""
    extract: Annotated[Extract, *Part] = dataclasses.field(
        default_factory=lambda: Extract(limit=120, batch_size=8, out=Path(STORE))
    )
    """Flags of extract.py."""
    train: Annotated[RunConfig, *Part] = dataclasses.field(
        default_factory=lambda: RunConfig(source="store", store=Path(STORE), out=Path("OUT/train"))
    )
    """Flags of train_sae.py."""
    evaluate: Annotated[evaluate_sae.Config, *Part] = dataclasses.field(
        default_factory=lambda: evaluate_sae.Config(sae=(SAES,), out=Path("OUT/evaluate"))
    )
    """Flags of evaluate_sae.py."""

    @classmethod
    def told(cls, arguments: Sequence[str]) -> tuple["Config", list[str]]:
        """What the file of `--config` says, and then the command line of the stages; and the words that are left."""
        default = cls()
        for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
            path = following if word == "--config" else word.removeprefix("--config=")
            if path != word and path and not path.startswith("--"):
                default = recipes.read(Path(path), cls())
                if default.config is not None:
                    raise InputError(f"{path}: config: found {default.config}, expected none: a file names no other")
        return recipes.told(default, arguments)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command as a part of this one, with its resolved flags."""

    name: str
    config: Any
    run: Callable[[Any], None]
    result: str  # what lies in its directory when it has ended
    basis: Basis
    doing: Literal["run", "whole", "left out", "nothing"]

    @property
    def results(self) -> list[Path]:
        return [self.config.out / self.result] if isinstance(self.config.out, Path) else []


def main(config: Config) -> None:
    tracking.check(config.track)
    config.check_mesh()
    check(plan(config, stages.Marks(config.out)))
    with locks.claimed(config.out):
        work(config, stages.Marks(config.out))


def transform(config: transform_dataset.Config) -> None:
    """The command refuses what is finished; here a kill may have come between its end and the mark."""
    then = pipeline_report.object_in(config.out / "run.json").get("config") or {}
    if not transform_dataset.finished(config.out) or {**then, "out": str(config.out)} != files.jsonable(config):
        transform_dataset.main(config)


COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "transform": (transform, "challenges.json"),
    "extract": (extract.main, "manifest.json"),
    "train": (train_sae.main, "metrics.json"),
    "evaluate": (evaluate_sae.main, "metrics.json"),
}


def plan(config: Config, marks: stages.Marks) -> list[Stage]:
    """The stages in order, and what there is to do for each."""
    unknown = [name for name in config.stages if name not in (*COMMANDS, "report")]
    if unknown or not config.stages:
        raise InputError(f"--stages: found {', '.join(unknown) or 'none'}, expected of {', '.join(COMMANDS)}, report")
    told = {name: shared(config, getattr(config, name)) for name in COMMANDS}
    if told["transform"].dataset and told["extract"].tasks == wording.AUTO:
        told["extract"] = dataclasses.replace(told["extract"], tasks=TASKS)
    filled = stages.resolved(told, config.out)
    planned: list[Stage] = []
    for name, (run, result) in COMMANDS.items():
        before = next((each.basis for each in reversed(planned) if each.doing != "nothing"), None)
        basis = stages.basis(told[name], filled[name], before)
        stage = Stage(name, filled[name], run, result, basis, "run")
        if name == "transform" and not filled[name].dataset:
            stage = dataclasses.replace(stage, doing="nothing")
        elif name not in config.stages:
            stage = dataclasses.replace(stage, doing="left out")
        elif marks.whole(name, basis, stage.results):
            stage = dataclasses.replace(stage, doing="whole")
        planned.append(stage)
    return planned


def shared(config: Config, table: Any) -> Any:
    """The flags of a stage, with those of this command that it has too: its own --mesh wins, its own --track does not."""
    if config.track != "none" and hasattr(table, "track"):
        table = dataclasses.replace(table, track=config.track)
    if isinstance(table, meshes.OnMesh) and table.mesh is None:
        table = dataclasses.replace(table, mesh=config.mesh)
    return table


# ---------------------------------------------------------------- before the first stage


def check(planned: Sequence[Stage]) -> None:
    """Raises for flags of any stage that no run can have, before the first one begins; one that is whole had them."""
    of = {stage.name: stage for stage in planned}
    for stage in planned:
        if stage.doing == "run":
            with recipes.of_table(stage.name):
                bounds.check(stage.config)
                if isinstance(stage.config, meshes.OnMesh):
                    stage.config.check_mesh()
                CHECKS[stage.name](stage.config, of)


def check_transform(config: transform_dataset.Config, of: dict[str, Stage]) -> None:
    transform_dataset.check(config)
    first = transform_dataset.sources(config)[0]
    if Path(config.dataset).suffix in STREAMED:  # a file here, not one that a hub would send
        next(iter_records(first), None)


def check_extract(config: Extract, of: dict[str, Stage]) -> None:
    sites_of(config)
    named = described(config)[0].tasks
    if not config.data and of["transform"].doing != "run" and next(iter(arc.iter_tasks(named)), None) is None:
        raise InputError(f"--tasks {named}: found no tasks, expected at least one")


def check_train(config: RunConfig, of: dict[str, Stage]) -> None:
    if config.source != "store":
        raise InputError("--source: found live, expected store: a pipeline trains on what extract wrote")
    settings.check(config)
    combined = sweeps.combinations(config)
    if of["extract"].doing == "run":
        with recipes.of_table("extract"):
            sites = sites_of(of["extract"].config)
    else:
        sites = sae.ActivationStore.open(config.store).sites
    default = places.default_held(sites, settings.form_of(config))
    sweeps.make_members(config, combined, places.among(sites), default)


def check_evaluate(config: evaluate_sae.Config, of: dict[str, Stage]) -> None:
    evaluate_sae.check(config)
    if of["train"].doing != "run":
        for place in loading.find(config.sae).values():
            sae.load_with_metadata(place, k=config.k)


CHECKS = {"transform": check_transform, "extract": check_extract, "train": check_train, "evaluate": check_evaluate}


def described(config: Extract) -> tuple[Extract, qwen_eqx.QwenConfig]:
    """With the names that the model's directory says for `auto`, and the model's shape; its weights are not read."""
    directory = hub.locate(config.model, config.revision)
    shape = qwen_eqx.QwenConfig.from_file(directory / hub.CONFIG)
    tokenizer = qwen_eqx.Tokenizer.from_directory(directory, vocab_size=shape.vocab)
    return wording.filled(config, tokenizer), shape


def sites_of(config: Extract) -> tuple[str, ...]:
    """The sites that a store will hold."""
    _, shape = described(config)
    layers = [] if config.layers == "none" else places.parse_layers(config.layers, shape.layers)
    capture = qwen_eqx.Capture(layers=layers, sites=config.sites)
    return tuple(str(site) for site in capture.resolve(shape))


# ---------------------------------------------------------------- the stages


def work(config: Config, marks: stages.Marks) -> None:
    """Every stage that is not whole, then the page.

    They run in this process, one after another: it is the one that a signal or a kill ends, and with it every lock; its
    memory is free again after each, and a stage resumes as its command does.
    """
    files.expect_files(config.out, "run.json", stages.FILE, RECIPE, PAGE)
    fresh = not (config.out / stages.FILE).exists()
    if fresh:
        keep(config)
    said = {}
    planned = plan(config, marks)
    for stage in planned:
        said[stage.name] = SAID.get(stage.doing, "")
        cli.console.rule(": ".join(filter(None, (stage.name, said[stage.name]))), align="left")
        if stage.doing == "run":
            seconds = proceed(stage, marks)
            said[stage.name] = f"made in {seconds:,.0f} s"
    keep(config)  # only now: a stage refuses what the directory was not begun with
    if "report" in config.stages:
        report(config, planned, said)


SAID = {
    "whole": "whole, skipped",
    "left out": "left out of --stages",
    "nothing": "nothing to do: no --transform.dataset is named",
}


def proceed(stage: Stage, marks: stages.Marks) -> float:
    """One stage, from where it stands to its mark; returns the seconds that all its runs took."""
    mark, basis = marks.of.get(stage.name), stage.basis
    same = mark if mark is not None and mark.basis.flags == basis.flags else None
    begun = stage.name == "train" and (stage.config.out / "checkpoints").exists()
    if begun and same and same.basis.reads != basis.reads:
        found = "a dictionary trained on what extract wrote with other flags"
        raise InputError(f"{stage.config.out}: found {found}, expected more --train.steps, or another --out")
    before = same.seconds if same else 0.0
    marks.set(stage.name, basis, False, before)
    begin = time.perf_counter()
    with recipes.of_table(stage.name):
        stage.run(stage.config)
    gc.collect()  # arrays in cycles are memory that the next stage may need
    seconds = before + time.perf_counter() - begin
    marks.set(stage.name, basis, True, seconds)
    return seconds


def keep(config: Config) -> None:
    """Says beside the results what they were made with."""
    provenance.record_run(config.out, config)
    files.write_text(config.out / RECIPE, recipe(config))


def recipe(config: Config) -> str:
    """The flags of all stages, with which the run can be repeated elsewhere."""
    heading = ("python experiments/pipeline.py --config THIS --out ELSEWHERE", "OUT/STAGE is the directory of a stage.")
    text = recipes.written(dataclasses.replace(config, config=None), heading)
    return text.replace('config = "None"\n', "", 1)  # a file names no other


def report(config: Config, planned: Sequence[Stage], said: dict[str, str]) -> None:
    sections = [pipeline_report.section(stage.name, said[stage.name], Path(stage.config.out)) for stage in planned]
    facts = pipeline_report.facts_of(config.out)
    title = f"{config.extract.model}: from tasks to features"
    files.write_text(config.out / PAGE, pipeline_report.page(config.out, title, facts, sections, recipe(config)))
    cli.console.rule("report", align="left")
    cli.console.print(f"wrote: {config.out / PAGE}, {config.out / RECIPE}", markup=False)
    cli.console.print(f"next: open {config.out / PAGE}", markup=False)
    trained = next(Path(stage.config.out) for stage in planned if stage.name == "train")
    cli.console.print(f"      python experiments/find_features.py --sae {trained / 'sae'}", markup=False)


if __name__ == "__main__":
    cli.run(main, Config)
