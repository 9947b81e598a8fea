"""Train sparse autoencoders on what a model computes while it reads and answers ARC tasks.

Without flags: live on the embedded demo model, about two minutes on a laptop. `--source store --store DIR` replays what
`extract.py` wrote. `--sweep k=8,16,32` trains one for each value on the same activations, `--sweep layer=1,2,3 k=8,16` one
for each pair, all sites captured in one pass of the model. `--target-site` trains transcoders; in a sweep of several,
`--sweep site=IN:OUT,IN:OUT` names their pairs.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

from contextlib import nullcontext

from qwen_lab import cli, figures, hosts, jobs, joining, locks
from qwen_lab.runs import Run
from qwen_lab.settings import RunConfig
from sae.formats import saelens


def main(config: RunConfig) -> None:
    if (found := hosts.Hosts.of(config)) is not None:
        share(config, found)
        return
    job = jobs.open_job(config)
    if config.source == "live":
        cli.say_what_a_demo_is(config.model)
    announce(config, job)
    with locks.claimed(config.out):
        train(config, job)


def share(config: RunConfig, found: hosts.Hosts) -> None:
    """One of several processes that train together; the first speaks for all."""
    cli.console.print(f"process {found.number} of {found.processes}, waiting for all at {found.coordinator}")
    with locks.claimed(config.out) if found.number == 0 else nullcontext(), jobs.shared_job(config, found) as job:
        cli.console.quiet = found.number > 0
        announce(config, job)
        train(config, job)


def train(config: RunConfig, job: jobs.Job) -> None:
    """From the last checkpoint to dictionaries that are measured and saved."""
    run = Run.start(config, job.members, job.source, job.mesh)
    if not run.fresh:
        cli.console.print(f"going on from step {run.step} of {config.steps}")
    with cli.bar(config.steps, "training", "steps") as advance:
        advance(run.step)
        run.proceed(advance)
    cli.console.print(run.shares())
    results = run.finish(job.facts)
    if not joining.first():
        return
    table = figures.metrics_table({name: result.metrics for name, result in results.items()})
    cli.console.print(table, soft_wrap=False)
    cli.console.print(f"these are of {next(iter(results.values())).metrics['rows_of']}")
    picture = figures.loss_curves(config.out / "loss.svg", run.history, list(results))
    cli.console.print(f"loss curve: {picture}", markup=False)
    first = next(iter(results.values())).saved
    cli.console.print(f"saved: {config.out / 'sae'} (SAELens directories), {config.out / 'metrics.json'}")
    cli.console.print(f"next: python experiments/evaluate_sae.py --sae {config.out / 'sae'}")
    cli.console.print(f"      python experiments/steer.py --sae {first}")


def announce(config: RunConfig, job: jobs.Job) -> None:
    transcodes = job.members[0].place.transcodes
    kind = f"{config.form} {'transcoder' if transcodes else 'SAE'}"
    where = ", ".join(dict.fromkeys(str(member.place) for member in job.members))
    count = len(job.members)
    cli.console.print(f"{count} {kind}{'s' * (count > 1)} on {where} of {job.facts['model_name']}")
    if not saelens.opens(config.form, transcodes):
        cli.console.print(
            f"SAELens has no {kind.removesuffix(' SAE')} and will not open it; --form batchtopk gives one that it opens."
        )


if __name__ == "__main__":
    cli.run(main, RunConfig)
