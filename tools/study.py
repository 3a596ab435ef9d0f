"""Strategies x seeds x orders: runs what is missing, keeps a line for each run, and writes the table and the figure.

    python tools/study.py choose            every method's settings, on validation images
    python tools/study.py run               the study itself; may be stopped and started again at any time
    python tools/study.py report            docs/results.md's table and figure from what has been run
    python tools/study.py cost              seconds and memory of each strategy beside fine-tuning's

What is run stands in tools/study.yaml. On CPUs as many runs go side by side as there are cores, with a thread each, which is
the most work in a given time; on a GPU one after another, unless --jobs says otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import click
import yaml
from attrs import frozen
from study_report import (
    Line,
    add_line,
    choice_table,
    cost_table,
    figure,
    read_lines,
    results_table,
    write_between_marks,
)  # fmt: skip

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.report.result import Result

HERE = Path(__file__).parent
ROOT = HERE.parent


@frozen(kw_only=True)
class Job:
    """One run: what it is called in the table, and how it differs from the recipe."""

    part: str
    """choice, study, ablation or cost"""
    order: str
    label: str
    seed: int
    strategy: str
    without: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def planned(plan: dict[str, Any]) -> Iterator[Job]:
    """The study's runs, most wanted first."""
    orders = plan["orders"]
    wanted = [(order, group) for group in ("many", "few") for order in orders]
    for order, group in wanted:
        for seed in plan["seeds"][order][group]:
            for name in plan[group]:
                if name not in plan["once"] or seed == plan["seeds"][order][group][0]:
                    yield Job(part="study", order=order, label=name, seed=seed, strategy=name)
    ablation = plan["ablation"]
    for seed in ablation["seeds"]:
        common = {"part": "ablation", "order": "I", "seed": seed, "strategy": ablation["strategy"]}
        for stage in ablation["without"]:
            yield Job(label=f"without {stage}", without=(stage,), **common)
        for label, settings in ablation["changed"].items():
            yield Job(label=label, settings=tuple(settings), **common)


def choices(plan: dict[str, Any]) -> Iterator[Job]:
    """Every method's settings, on order I's validation images."""
    seed = plan["choice"]["seed"]
    for name, candidates in plan["choice"]["settings"].items():
        for settings in candidates:
            label = f"{name}: {', '.join(settings) or 'as it is'}"
            held_out = (*settings, "stream.evaluate_on=validation")
            yield Job(part="choice", order="I", label=label, seed=seed, strategy=name, settings=held_out)


def resolved(plan: dict[str, Any], job: Job) -> Any:
    """The recipe of a job, as the command line would make it."""
    order = plan["orders"][job.order]
    settings = [f"stream.order={yaml.safe_dump(order, default_flow_style=True).splitlines()[0]}", *job.settings]
    settings += ["loggers=[]", "train.checkpoint.keep=0"]
    changes = Changes(strategy=job.strategy, without_plugins=job.without, settings=tuple(settings), seeds=(job.seed,))
    return resolve(str(ROOT / plan["recipe"]), changes)


def quiet_run(plan: dict[str, Any], job: Job, out: Path, threads: int) -> Result:
    """One run in this process, whose progress goes into a file."""
    import torch

    from mulki_plugins.training.experiment import run_experiment

    torch.set_num_threads(threads)
    folder = out / job.part / job.order / re.sub(r"[^\w.=-]+", "-", job.label)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"seed-{job.seed}.log").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        return run_experiment(resolved(plan, job), job.seed, folder)


def run_job(plan: dict[str, Any], job: Job, out: Path, threads: int) -> Line:
    """In a process of its own: one run, as a line of the table."""
    result = quiet_run(plan, job, out, threads)
    matrix, zero = result.matrix, result.zero_shot
    known = {name: result.metrics.get(name) for name in ("transfer", "average", "last", "forgetting")}
    diagonal = [row[i] for i, row in enumerate(matrix)]
    return Line(
        part=job.part, order=job.order, label=job.label, seed=job.seed, fingerprint=result.settings, **known,
        just_learned=sum(diagonal) / len(diagonal), zero_shot=sum(zero) / len(zero),
        zero_shot_later=sum(zero[1:]) / max(1, len(zero) - 1),
        seconds=sum(result.seconds.get("train", [])), memory=result.device["peak_memory_mib"],
    )  # fmt: skip


def missing(plan: dict[str, Any], jobs: Iterable[Job], lines: list[Line]) -> tuple[list[Job], list[Line]]:
    """The jobs of which no line was measured with today's settings, and the lines that were."""
    from mulki_plugins.training.experiment import fingerprint

    by_key = {(line.part, line.order, line.label, line.seed, line.fingerprint): line for line in lines}
    left, found = [], []
    for job in jobs:
        key = (job.part, job.order, job.label, job.seed, fingerprint(resolved(plan, job).recipe))
        if key in by_key:
            found.append(by_key[key])
        else:
            left.append(job)
    return left, found


def work_off(plan: dict[str, Any], jobs: list[Job], table: Path, out: Path, processes: int, threads: int) -> None:
    """Run the jobs, each in a fresh process, and add each one's line when it is there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mulki_plugins.training.experiment"])
    began, waiting = time.monotonic(), list(jobs)
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        running: dict[Future[Line], Job] = {}
        done = 0
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                running[pool.submit(run_job, plan, job, out, threads)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                done += 1
                click.echo(
                    f"[{done}/{len(jobs)}, {(time.monotonic() - began) / 60:.0f} min] {_outcome(future, job, table)}",
                    err=True,
                )


def _outcome(future: Future[Line], job: Job, table: Path) -> str:
    name = f"{job.part} {job.order} {job.label} seed {job.seed}"
    try:
        line = future.result()
    except MulkiError as error:
        return f"{name}: FAILED: {error.lines()[0]}"
    except Exception as error:  # one run that fails must not end the others
        return f"{name}: FAILED: {type(error).__name__}: {error}"
    add_line(table, line)
    said = [
        f"{label} {value:.1f}"
        for label, value in (("T", line.transfer), ("A", line.average), ("L", line.last))
        if value is not None
    ]
    return f"{name}: {' '.join(said)} ({line.seconds:.0f} s)"


@click.group(help=(__doc__ or "").splitlines()[0])
@click.option(
    "--plan", "plan_path", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=HERE / "study.yaml"
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
    click.echo(choice_table(found))


@main.command()
@running
def run(told: tuple[dict[str, Any], Path], **options: Any) -> None:
    """The study and the ablation, as far as they have not been run."""
    plan, table = told
    run_missing(plan, list(planned(plan)), table, **options)


@main.command()
@click.option("--docs", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs")
@click.pass_obj
def report(told: tuple[dict[str, Any], Path], docs: Path) -> None:
    """The table (to the screen and into docs/results.md, between its marks) and the figure docs/study.png."""
    plan, table = told
    left, found = missing(plan, planned(plan), read_lines(table))
    text = results_table(found, plan)
    click.echo(text)
    write_between_marks(docs / "results.md", text)
    figure(found, plan).savefig(docs / "study.png", dpi=130)
    if left:
        click.echo(f"{len(left)} of {len(left) + len(found)} runs are missing", err=True)


@main.command()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "runs" / "study")
@click.pass_obj
def cost(told: tuple[dict[str, Any], Path], rounds: int, out: Path) -> None:
    """Seconds a step and peak memory of every strategy over fine-tuning's, measured in turn, one run at a time.

    Each measures the second of two tasks, in which both teachers are at work, from its prototypes to its last step.
    """
    plan, _ = told
    click.echo(cost_table(measured_costs(plan, rounds, out)))


def run_missing(
    plan: dict[str, Any], jobs: list[Job], table: Path, *, threads: int, jobs_: int | None = None, only: tuple[str, ...],
    out: Path, dry_run: bool,
) -> None:  # fmt: skip
    """Work off the jobs that no line of the table stands for."""
    chosen = [job for job in jobs if all(word in (job.part, job.order, *job.label.split()) for word in only)]
    left, found = missing(plan, chosen, read_lines(table))
    click.echo(f"{len(found)} runs are there, {len(left)} are missing", err=True)
    if dry_run:
        for job in left:
            click.echo(f"{job.part} {job.order} {job.label} seed {job.seed}")
        return
    work_off(plan, left, table, out, jobs_ or default_jobs(threads), threads)


def default_jobs(threads: int) -> int:
    """As many runs as the cores have room for; one where there is a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // threads)


def measured_costs(plan: dict[str, Any], rounds: int, out: Path) -> dict[str, list[tuple[float, float]]]:
    """(seconds of the second task, peak MiB) of each strategy and round; the rounds go through all strategies in turn."""
    budget = ("stream.tasks=[animals,food]", "train.checkpoint.keep=0")
    names = [name for name in (*plan["many"], *plan["few"]) if name not in ("zero-shot", "joint")]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mulki_plugins.training.experiment"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for seed in range(rounds):
            for name in names:
                job = Job(part="cost", order="I", label=name, seed=seed, strategy=name, settings=budget)
                found[name].append(pool.submit(second_task, plan, job, out).result())
                click.echo(f"round {seed + 1}: {name} {found[name][-1][0]:.1f} s", err=True)
    return found


def second_task(plan: dict[str, Any], job: Job, out: Path) -> tuple[float, float]:
    """In a process of its own: seconds of the second task's training, and the peak in MiB."""
    result = quiet_run(plan, job, out, threads=1)
    return result.seconds["train"][1], result.device["peak_memory_mib"]


if __name__ == "__main__":
    main()
