"""`mulki study`: run many recipes, strategies, seeds, orders and settings; see how far they are; make their tables."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import UserPath, echo_json, echo_note, report_errors
from mulki_plugins.cli.study_options import StudyCommands, into_option, only_option, running_options, study_options
from mulki_plugins.errors import MulkiError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mulki_plugins.study.conduct import Conductor
    from mulki_plugins.study.costs import CostLine
    from mulki_plugins.study.plan import Job
    from mulki_plugins.study.state import State


@click.group(cls=StudyCommands, subcommand_metavar="[run] STUDY [OPTIONS] | COMMAND [ARGS]...")
def study() -> None:
    """Run a whole study: recipes × strategies × seeds × orders × settings.

    STUDY is a path or the name of an installed study. `mulki study STUDY` runs what is missing, on this machine, on its
    GPUs, or on Slurm, and may be stopped and started again at any time.
    """


@study.command()
@study_options
@only_option
@running_options
@report_errors
def run(conductor: Conductor, only: tuple[str, ...], **options: Any) -> None:
    """Run what is missing of STUDY.

    A run that fails does not stop the others; the exit status is then 1. Runs that were stopped continue from their
    checkpoints. With `choice.apply`, the settings are chosen first.
    """
    from mulki_plugins.study.choose import check_metrics
    from mulki_plugins.study.conduct import choose_jobs, has_words
    from mulki_plugins.study.plan import candidates_of, reported_jobs_of_any_choice
    from mulki_plugins.study.tables import results_text

    study_ = conductor.file.study
    planned = choose_jobs(list(reported_jobs_of_any_choice(study_)), only)
    failed = False
    if study_.choice is not None and study_.choice.apply and (candidates := candidates_of(study_, planned)):
        failed = not _run(conductor, candidates, **options).well
        check_metrics(conductor.look(candidates), study_.choice)
    jobs = [job for job in conductor.reported() if has_words(job, only)]
    if waiting := len(planned) - len(jobs):
        what = "1 run waits" if waiting == 1 else f"{waiting} runs wait"
        echo_note(f"{what} for the choice of settings; call this again when the candidates are done")
    ended = _run(conductor, jobs, **options) if jobs or not waiting else Ended(well=True, done=False)
    if ended.done and not waiting and not options["dry_run"]:
        found = conductor.look(conductor.reported())
        _echo_text(results_text(found, study_, conductor.costs()))
    if failed or not ended.well:
        raise SystemExit(1)


@study.command()
@study_options
@only_option
@running_options
@report_errors
def choose(conductor: Conductor, only: tuple[str, ...], **options: Any) -> None:
    """Try every method's candidate settings by STUDY's rule, and print them with the best first."""
    from mulki_plugins.study.conduct import choose_jobs
    from mulki_plugins.study.plan import choice_jobs
    from mulki_plugins.study.tables import choice_table

    rule = conductor.file.study.choice
    if rule is None:
        raise MulkiError(f"{conductor.file.file.shown}: the study has no `choice`", "docs/study.md describes it")
    jobs = choose_jobs(list(choice_jobs(conductor.file.study)), only)
    ended = _run(conductor, jobs, **options)
    if not options["dry_run"]:
        _echo_text(choice_table(conductor.look(jobs), rule))
    if not ended.well:
        raise SystemExit(1)


@study.command()
@study_options
@only_option
@click.option("--json", "as_json", is_flag=True, help="Print {study, counts, seconds_left, runs} as JSON.")
@report_errors
def status(conductor: Conductor, only: tuple[str, ...], as_json: bool) -> None:
    """Show how far STUDY is: done, running, waiting, failed and why, and the time left."""
    from mulki_plugins.bench.table import duration
    from mulki_plugins.study.conduct import choose_jobs, seconds_left, share_done, summary

    found = conductor.look(choose_jobs(_all_jobs(conductor), only))
    left = seconds_left(found)
    if as_json:
        echo_json(_status_data(conductor, found, left))
        return
    click.echo(printable(f"{conductor.file.study.name}: {summary(found)}"))
    for state in found:
        if state.status not in ("done", "missing"):
            share = f"{share_done(state):.0%} of its tasks, " if state.status == "running" else ""
            click.echo(printable(f"  {state.status:8} {state.run.job.title}: {share}{state.reason}"))
    unfinished = any(state.status != "done" for state in found)
    if unfinished and left is not None:
        at_once = sum(state.status == "running" for state in found)
        running = f"{at_once} at the same time" if at_once else "one after another; nothing is running"
        click.echo(f"  time left: about {duration(left)}, {running}")
    if runner := conductor.runner():
        click.echo(f"  process {runner.get('pid')} on {runner.get('host')} is running this study")


@study.command()
@study_options
@only_option
@report_errors
def cancel(conductor: Conductor, only: tuple[str, ...]) -> None:
    """Stop the runs of STUDY, those in Slurm's queue too. Each stops with a checkpoint, and can go on later.

    Without --only, the process that runs the study on this machine ends too.
    """
    import os
    import signal
    import socket

    from mulki_plugins.study.conduct import choose_jobs

    runner = conductor.runner()
    if runner and not only and runner.get("host") == socket.gethostname() and isinstance(runner.get("pid"), int):
        os.kill(int(str(runner["pid"])), signal.SIGTERM)
        echo_note(f"process {runner['pid']}, which runs this study, stops")
    stopped, elsewhere = conductor.cancel(choose_jobs(_all_jobs(conductor), only))
    for line in elsewhere:
        echo_note(f"warning: {line}")
    click.echo(f"cancelled {stopped} run{'s' if stopped != 1 else ''}")


@study.command()
@study_options
@into_option("study")
@click.option(
    "--figure", type=UserPath(dir_okay=False, path_type=Path), help="Also draw Last over Transfer: a PNG, SVG or PDF."
)
@click.option("--json", "as_json", is_flag=True, help="Print the lines of the table as JSON.")
@report_errors
def collect(conductor: Conductor, into: Path | None, figure: Path | None, as_json: bool) -> None:
    """Collect the finished runs of STUDY in its table, and print them: mean ± standard deviation over seeds.

    With what `mulki study cost` has measured, the tables say what each strategy costs, too.
    """
    from attrs import asdict

    from mulki_plugins.study.plan import choice_jobs
    from mulki_plugins.study.tables import choice_table, cost_table, results_text, write_between_marks

    study_ = conductor.file.study
    found, tried = conductor.collect(conductor.reported()), conductor.collect(choice_jobs(study_))
    lines = [state.line for state in found if state.line is not None]
    costs = conductor.costs() if study_.cost is not None else []
    text = results_text(found, study_, costs) if lines else "Not run yet."
    chosen = choice_table(tried, study_.choice) if study_.choice is not None else ""
    cost_text = cost_table(costs, study_.cost.base) if study_.cost is not None and costs else ""
    if into is not None:
        others = {"choice": chosen, "cost": cost_text}
        write_between_marks(into, {"study": text} | {name: other for name, other in others.items() if other})
    if figure is not None and lines:
        _draw(conductor, found, figure)
    if as_json:
        echo_json([asdict(state.line) for state in [*found, *tried] if state.line is not None])
    else:
        _echo_text(text)
    for what, values in (
        ("versions of the code", {x.code for x in lines}),
        ("types of device", {x.device for x in lines}),
    ):
        if len(values) > 1:
            echo_note(f"note: these lines were measured with {len(values)} {what}")


@study.command()
@study_options
@click.option(
    "--rounds", type=click.IntRange(min=1), help="How often each strategy is measured.  [default: the study's]"
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each run.")
@click.option("--dry-run", is_flag=True, help="Print what would run, as commands; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the lines of the file as JSON.")
@into_option("cost")
@report_errors
def cost(
    conductor: Conductor, rounds: int | None, threads: int, dry_run: bool, into: Path | None, as_json: bool
) -> None:
    """Measure what each strategy of STUDY costs on this machine, one run at a time, round after round.

    The table has the milliseconds of a step of the last task (with what the task takes before its first step), the peak
    memory (of the process, or what tensors took on a GPU), the number of trained weights, and what the model takes on the
    disk. Time and memory are compared with those of a base in the same round. The lines go into a file beside the study's
    table, such as study-cost.csv, from which `collect` takes them.
    """
    from attrs import asdict, evolve

    from mulki_plugins.study.plan import cost_jobs
    from mulki_plugins.study.tables import cost_table, write_between_marks

    rule = conductor.file.study.cost
    if rule is None:
        raise MulkiError(f"{conductor.file.file.shown}: the study has no `cost`", "docs/study.md describes it")
    wanted = rounds or rule.rounds
    study_ = evolve(conductor.file.study, cost=evolve(rule, rounds=max(wanted, rule.rounds)))
    jobs = [job for job in cost_jobs(study_) if job.seed < wanted]
    costs: list[CostLine] = []
    try:
        ended = _run(
            conductor, jobs, dry_run=dry_run, no_wait=False, options=(), on="local", processes=1, threads=threads
        )
    finally:  # also if it is stopped
        if not dry_run:
            costs = conductor.collect_costs(cost_jobs(study_))
    if dry_run:
        return
    text = cost_table(costs, rule.base)
    if into is not None:
        write_between_marks(into, {"cost": text})
    if as_json:
        echo_json([asdict(line) for line in costs])
    else:
        _echo_text(text)
    if not ended.well:
        raise SystemExit(1)


@frozen(kw_only=True)
class Ended:
    """How a call that runs something ended: without a run that failed, and with all of them done."""

    well: bool
    done: bool


def _all_jobs(conductor: Conductor) -> list[Job]:
    """The study's runs; those of `choose` and `cost` as far as they have been started, or the study waits for them."""
    from mulki_plugins.study.plan import choice_jobs, cost_jobs

    study_ = conductor.file.study
    candidates = list(choice_jobs(study_))
    if study_.choice is not None and not study_.choice.apply:
        candidates = conductor.begun(candidates)
    return [*candidates, *conductor.reported(), *conductor.begun(cost_jobs(study_))]


def _run(
    conductor: Conductor, jobs: Sequence[Job], *, dry_run: bool, no_wait: bool, options: tuple[str, ...], **more: Any
) -> Ended:
    """Run what is missing of these, or print it. Prints a line for each run that failed or was cancelled."""
    from mulki_plugins.study.conduct import summary, with_options
    from mulki_plugins.study.slurm import minutes

    pairs = dict(option.partition("=")[::2] for option in options)
    if wrong := [option for option in options if "=" not in option]:
        raise MulkiError(f"--slurm {wrong[0]}: expected KEY=VALUE, such as account=lab")
    how = with_options(conductor.file.study.run, options=pairs, **more)
    _check_where(how.on, {**more, "slurm": options or None, "no_wait": no_wait or None})
    minutes(how.slurm.time)
    if dry_run:
        return Ended(well=True, done=_print_commands(conductor, jobs))
    found = conductor.run(jobs, how, wait=not no_wait)
    unfinished = [state for state in found if state.status in ("failed", "stopped", "missing")]
    echo_note(summary(found))
    for state in unfinished:
        click.echo(printable(f"error: {state.run.job.title}: {state.status}: {state.reason}"), err=True)
    return Ended(well=not unfinished, done=all(state.status == "done" for state in found))


def _check_where(on: str, options: Mapping[str, Any]) -> None:
    """MulkiError for options that say nothing where the runs go."""
    places = {"processes": "local", "gpus_per_run": "gpus"}
    places |= dict.fromkeys(("partition", "time", "memory", "gpus", "nodes", "at_once", "slurm", "no_wait"), "slurm")
    for name, place in places.items():
        if options.get(name) is not None and place != on:
            flag = f"--{name.replace('_', '-')}"
            raise MulkiError(f"{flag}: the runs go --on {on}", f"{flag} is for --on {place}")


def _echo_text(text: str) -> None:
    click.echo("\n".join(map(printable, text.splitlines())))


def _print_commands(conductor: Conductor, jobs: Sequence[Job]) -> bool:
    """Print the commands of the runs that are missing. Returns whether none is."""
    from mulki_plugins.study.conduct import summary
    from mulki_plugins.study.launch import arguments

    found = conductor.look(jobs)
    echo_note(summary(found))
    for state in found:
        if state.status != "done":
            click.echo(printable(f"mulki {shlex.join(arguments(state.run))}"))
    return all(state.status == "done" for state in found)


def _status_data(conductor: Conductor, found: Sequence[State], left: float | None) -> dict[str, Any]:
    from collections import Counter

    from mulki_plugins.study.conduct import share_done

    return {
        "study": conductor.file.study.name,
        "folder": str(conductor.root),
        "counts": dict(Counter(state.status for state in found)),
        "seconds_left": left,
        "runs": [
            {
                "part": state.run.job.part, "order": state.run.job.order, "label": state.run.job.label,
                "seed": state.run.job.seed, "status": state.status, "reason": state.reason,
                "share": 1.0 if state.status == "done" else share_done(state), "folder": str(state.run.folder),
                "fingerprint": state.run.fingerprint,
            }
            for state in found
        ],
    }  # fmt: skip


def _draw(conductor: Conductor, found: Sequence[State], path: Path) -> None:
    from mulki_plugins.libraries import import_library

    import_library("matplotlib")
    from mulki_plugins.study.figure import draw

    try:
        draw(found, conductor.file.study).savefig(path, dpi=130)
    except (OSError, ValueError) as error:  # a folder that is missing, a format that is unknown
        raise MulkiError(f"{path}: the figure cannot be written: {error}") from error
