"""Strategies x seeds x orders: runs what is missing, keeps a line for each run, and writes the table and the figure.

    python tools/study.py choose            every method's settings, on validation images
    python tools/study.py run               the study itself; may be stopped and started again at any time
    python tools/study.py report            docs/results.md's tables and figure from what has been run
    python tools/study.py cost              seconds and memory of each strategy beside fine-tuning's

What is run stands in tools/study.yaml. On CPUs as many runs go side by side as there are cores, with a thread each, which is
the most work in a given time; on a GPU one after another, unless --jobs says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml
from study_jobs import ROOT, Job, choices, default_jobs, measured_costs, missing, planned, work_off
from study_report import (
    alone_text,
    choice_table,
    cost_table,
    figure,
    read_lines,
    results_table,
    write_between_marks,
    zero_shot_text,
)  # fmt: skip


@click.group(help=(__doc__ or "").splitlines()[0])
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=ROOT / "tools" / "study.yaml",
)
@click.option("--table", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "docs" / "study.csv")
@click.pass_context
def main(context: click.Context, plan_path: Path, table: Path) -> None:
    """What every command needs: the plan, and the table of runs."""
    table.parent.mkdir(parents=True, exist_ok=True)
    context.obj = (yaml.safe_load(plan_path.read_text("utf-8")), table)


def running(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the commands that run something."""
    for decorate in (
        click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of each run."),
        click.option(
            "--jobs", "jobs_", type=click.IntRange(min=1), help="Runs side by side; as many as cores, or 1 on a GPU."
        ),
        click.option(
            "--only", multiple=True, help="Only runs whose part, order or label has this word; may be repeated."
        ),
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "runs" / "study"),
        click.option("--dry-run", is_flag=True, help="Only say what is missing."),
        click.pass_obj,
    ):
        function = decorate(function)
    return function


@main.command()
@running
def choose(told: tuple[dict[str, Any], Path], **options: Any) -> None:
    """Each method's settings on validation images; prints them with the best first."""
    plan, table = told
    run_missing(plan, list(choices(plan)), table, **options)
    found = missing(plan, choices(plan), read_lines(table))[1]
    if options["dry_run"]:
        return
    click.echo(choice_table(found))


@main.command()
@running
def run(told: tuple[dict[str, Any], Path], **options: Any) -> None:
    """The study and the ablation, as far as they have not been run."""
    plan, table = told
    run_missing(plan, list(planned(plan)), table, **options)


@main.command()
@click.pass_obj
def report(told: tuple[dict[str, Any], Path]) -> None:
    """The tables (to the screen and into results.md beside the table of runs, between its marks) and the figure study.png."""
    plan, table = told
    lines = read_lines(table)
    left, found = missing(plan, planned(plan), lines)
    unfinished = f"{len(left)} of the plan's {len(left) + len(found)} runs are still to come." if left else ""
    parts = [results_table(found, plan), zero_shot_text(found), alone_text(found), unfinished]
    text = "\n\n".join(filter(None, parts))
    click.echo(text)
    write_between_marks(table.parent / "results.md", "study", text if found else "Not run yet.")
    tried = missing(plan, choices(plan), lines)[1]
    write_between_marks(table.parent / "results.md", "choice", choice_table(tried))
    if found:
        figure(found, plan).savefig(table.parent / "study.png", dpi=130)
    if (codes := len({line.code for line in found})) > 1:
        click.echo(f"note: these lines were measured by {codes} versions of the code", err=True)


@main.command()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "runs" / "study")
@click.pass_obj
def cost(told: tuple[dict[str, Any], Path], rounds: int, out: Path) -> None:
    """Time and peak memory of every strategy over fine-tuning's, measured in turn, one run at a time.

    Time is that of the last of four tasks, with two teachers and three tasks' classes behind it, from its prototypes to its
    last step. Memory is the process's peak, evaluation and libraries included, or what tensors took on a GPU.
    """
    plan, table = told
    text = cost_table(measured_costs(plan, rounds, out))
    click.echo(text)
    write_between_marks(table.parent / "results.md", "cost", text)


def run_missing(
    plan: dict[str, Any], jobs: list[Job], table: Path, *, threads: int, jobs_: int | None = None, only: tuple[str, ...],
    out: Path, dry_run: bool,
) -> None:  # fmt: skip
    """Work off the jobs that no line of the table stands for."""
    chosen = [job for job in jobs if all(w in (job.part, job.order, job.strategy, *job.label.split()) for w in only)]
    if not chosen:
        raise click.UsageError(f"no run is of {' and '.join(only)}")
    left, found = missing(plan, chosen, read_lines(table))
    click.echo(f"{len(found)} runs are there, {len(left)} are missing", err=True)
    if dry_run:
        for job in left:
            click.echo(f"{job.part} {job.order} {job.label} seed {job.seed}")
        return
    work_off(plan, left, table, out, jobs_ or default_jobs(threads), threads)


if __name__ == "__main__":
    main()
