"""Train a small Qwen to solve procedural ARC tasks in context, or fine-tune one that is there.

Without flags: 36 families of tasks on grids of 3 to 6 a side, hours on a laptop; `--steps 300` shows the beginning.
`--init DIR --lora-rank 8` fine-tunes a model. Four families are never trained on and measured apart.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

from contextlib import nullcontext

from qwen_lab import cli, figures, hosts, joining, lm_runs, locks
from qwen_lab.lm_runs import MODEL, LMRun
from qwen_lab.lm_settings import LMConfig


def main(config: LMConfig) -> None:
    if (found := hosts.Hosts.of(config)) is not None:
        share(config, found)
        return
    run = LMRun(config)
    with locks.claimed(config.out):
        run.open()
        train(run)


def share(config: LMConfig, found: hosts.Hosts) -> None:
    """One of several processes that train together; the first speaks for all."""
    cli.console.print(f"process {found.number} of {found.processes}, waiting for all at {found.coordinator}")
    with locks.claimed(config.out) if found.number == 0 else nullcontext(), lm_runs.shared(config, found) as run:
        cli.console.quiet = found.number > 0
        run.open()
        train(run)


def train(run: LMRun) -> None:
    """From the last checkpoint to a model directory."""
    config = run.config
    parameters = run.model.config.parameters
    cli.console.print(
        f"{parameters:,} parameters, {len(set(run.course.families))} families, "
        f"{config.accumulate * config.batch_size} tasks a step"
    )
    if config.tasks_share:
        fitting, offered = len(run.teacher.fitting), run.teacher.offered
        cli.console.print(
            f"{config.tasks_share:.0%} of the documents from {config.tasks}: {fitting} of its {offered} test inputs fit "
            f"{config.context_length} tokens",
            markup=False,
        )
    if run.step:
        cli.console.print(f"going on from step {run.step} of {config.steps}")
    with cli.bar(config.steps, "training", "steps") as advance:
        advance(run.step)
        run.proceed(advance)
    last = run.finish()
    if not joining.first():
        return
    for family, rate in sorted(last["families"].items(), key=lambda item: -item[1]):
        apart = "  (never trained on)" if family in config.held_out_families else ""
        cli.console.print(f"{rate:5.0%}  {family}{apart}", markup=False)
    cli.console.print(f"{last['seen']:5.1%}  mean of the trained families, on held-out tasks, greedy")
    picture = figures.learning_curves(config.out / "loss.svg", run.history)
    cli.console.print(f"learning curve: {picture}", markup=False)
    cli.console.print(f"saved: {config.out / MODEL}", markup=False)
    cli.console.print(f"next: python experiments/solve_arc.py --model {config.out / MODEL}", markup=False)


if __name__ == "__main__":
    cli.run(main, LMConfig)
