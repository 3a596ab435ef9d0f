"""The study's runs: which there are, which are missing, and how they are run."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import click
from attrs import frozen
from study_report import Line, add_line

from mulki_plugins.errors import MulkiError
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.report.result import Result

ROOT = Path(__file__).parent.parent


@frozen(kw_only=True)
class Job:
    """One run: what it is called in the table, and how it differs from the recipe."""

    part: str
    """choice, study, ablation, alone or cost"""
    order: str
    label: str
    seed: int
    strategy: str
    without: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def planned(plan: dict[str, Any]) -> Iterator[Job]:
    """The study's runs, most wanted first."""
    orders = plan["orders"]
    for order in orders:
        for name in plan["once"]:
            yield Job(part="study", order=order, label=name, seed=0, strategy=name)
    for group in ("many", "few"):
        for order in orders:
            for seed in plan["seeds"][order][group]:
                for name in plan[group]:
                    yield Job(part="study", order=order, label=name, seed=seed, strategy=name)
    ablation = plan["ablation"]
    for seed in ablation["seeds"]:
        common = {"part": "ablation", "order": "I", "seed": seed, "strategy": ablation["strategy"]}
        for label, stages in ablation["without"].items():
            yield Job(label=label, without=tuple(stages), **common)
        for label, settings in ablation["changed"].items():
            yield Job(label=label, settings=tuple(settings), **common)
    alone = plan["alone"]
    for seed in alone["seeds"]:
        for task in catalog().find("stream", alone["stream"]).tasks:
            settings = (f"stream.tasks=[{task}]",)
            yield Job(part="alone", order="I", label=task, seed=seed, strategy=alone["strategy"], settings=settings)


def choices(plan: dict[str, Any]) -> Iterator[Job]:
    """Every method's settings, on order I's validation images."""
    seed = plan["choice"]["seed"]
    for name, candidates in plan["choice"]["settings"].items():
        for settings in candidates:
            label = f"{name}: {', '.join(settings)}"
            held_out = (*settings, "stream.evaluate_on=validation")
            yield Job(part="choice", order="I", label=label, seed=seed, strategy=name, settings=held_out)


def resolved(plan: dict[str, Any], job: Job) -> Any:
    """The recipe of a job, as the command line would make it."""
    order = plan["orders"][job.order]
    settings = [f"stream.order={json.dumps(order)}", *job.settings]
    settings += ["loggers=[]", "train.checkpoint.keep=0"]
    changes = Changes(strategy=job.strategy, without_plugins=job.without, settings=tuple(settings), seeds=(job.seed,))
    return resolve(str(ROOT / plan["recipe"]), changes)


def quiet_run(plan: dict[str, Any], job: Job, out: Path, threads: int) -> Result:
    """One run in this process, whose progress goes into a file."""
    import torch

    from mulki_plugins.training.run import run_experiment

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
    known = {name: result.metrics.get(name) for name in ("transfer", "average", "forgetting")}
    diagonal = [row[i] for i, row in enumerate(matrix)]
    return Line(
        part=job.part, order=job.order, label=job.label, seed=job.seed, fingerprint=result.settings,
        device=result.device["type"], code=code_now(), last=sum(matrix[-1]) / len(matrix[-1]), **known,
        just_learned=sum(diagonal) / len(diagonal), zero_shot=sum(zero) / len(zero),
        zero_shot_later=sum(zero[1:]) / max(1, len(zero) - 1),
        seconds=sum(result.seconds.get("train", [])), memory=result.device["peak_memory_mib"],
    )  # fmt: skip


@functools.cache
def code_now() -> str:
    """A fingerprint of the package's code, which every line carries."""
    text = hashlib.sha256()
    for path in sorted((ROOT / "mulki_plugins").rglob("*.py")):
        text.update(path.read_bytes())
    return text.hexdigest()[:12]


def missing(plan: dict[str, Any], jobs: Iterable[Job], lines: list[Line]) -> tuple[list[Job], list[Line]]:
    """The jobs of which no line was measured with today's settings on such a device, and the newest lines that were.

    A change of the code makes no line stale, since most changes move no number; the report says how many codes it shows.
    """
    from mulki_plugins.recipe.settings import fingerprint
    from mulki_plugins.training.build import choose_device

    by_key = {(line.part, line.order, line.label, line.seed, line.fingerprint, line.device): line for line in lines}
    left, found = [], []
    for job in jobs:
        recipe = resolved(plan, job).recipe
        device = re.sub(":.*", "", recipe.device if recipe.device != "auto" else choose_device("auto").type)
        key = (job.part, job.order, job.label, job.seed, fingerprint(recipe), device)
        if key in by_key:
            found.append(by_key[key])
        else:
            left.append(job)
    return left, found


def work_off(plan: dict[str, Any], jobs: list[Job], table: Path, out: Path, processes: int, threads: int) -> None:
    """Run the jobs, each in a fresh process, and add each one's line when it is there."""
    context = _context()
    began, waiting, done = time.monotonic(), list(jobs), 0
    running: dict[Future[Line], tuple[Job, ProcessPoolExecutor]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            job, pool = waiting.pop(0), ProcessPoolExecutor(1, mp_context=context)
            running[pool.submit(run_job, plan, job, out, threads)] = job, pool
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, pool = running.pop(future)
            pool.shutdown()
            done += 1
            minutes = (time.monotonic() - began) / 60
            click.echo(f"[{done}/{len(jobs)}, {minutes:.0f} min] {_outcome(future, job, table)}", err=True)


def _context() -> ForkServerContext:
    """Processes that begin with everything imported, so that a run of a minute does not wait ten seconds for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mulki_plugins.training.run"])
    return context


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


def default_jobs(threads: int) -> int:
    """As many runs as the cores have room for; one where there is a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // threads)


def measured_costs(plan: dict[str, Any], rounds: int, out: Path) -> dict[str, list[tuple[float, float]]]:
    """(seconds of the last task, peak MiB) of each strategy and round; the rounds go through all strategies in turn."""
    budget = ("stream.tasks=[animals,flags,food,objects]", "stream.evaluate_on=validation")
    names = [name for name in (*plan["many"], *plan["few"]) if name != "joint"]  # which has no last task
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    context = _context()
    for seed in range(rounds):
        for name in names:
            job = Job(part="cost", order="I", label=name, seed=seed, strategy=name, settings=budget)
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found[name].append(pool.submit(last_task, plan, job, out).result())
            click.echo(f"round {seed + 1}: {name} {found[name][-1][0]:.1f} s", err=True)
    return found


def last_task(plan: dict[str, Any], job: Job, out: Path) -> tuple[float, float]:
    """In a process of its own: seconds of the last task's training, and the peak in MiB."""
    result = quiet_run(plan, job, out, threads=1)
    return result.seconds["train"][-1], result.device["peak_memory_mib"]
