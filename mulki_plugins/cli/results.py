"""`mulki results`: print the tables of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import UserPath, echo_json, echo_note, report_errors
from mulki_plugins.cli.watch import watch_option
from mulki_plugins.errors import Mistakes, MulkiError

if TYPE_CHECKING:
    from mulki_plugins.report.formats import Format, Table
    from mulki_plugins.report.predictions import Predictions
    from mulki_plugins.report.result import Result

NAMED = 5
"""Skipped folders that are named at most."""


@click.command()
@click.argument("folders", nargs=-1, required=True, type=UserPath(path_type=Path), metavar="DIR...")
@click.option(
    "--sort",
    metavar="COLUMN",
    help="Put the best first: by a metric, such as last, or by just-learned, time, memory, trained, flops or name.",
)
@click.option("--by-task", is_flag=True, help="Show the runs beside each other, task by task.")
@click.option(
    "--by-class",
    metavar="TASK",
    help="Show a task's classes, the worst first, what they are confused with, and the worst images.",
)
@click.option("--confusion", metavar="TASK", help="Show a task's confusion matrix after the last task.")
@click.option(
    "--worst", type=click.IntRange(min=0), default=5, show_default=True, help="With --by-class: images to name."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "latex", "csv", "md"]),
    default="text",
    show_default=True,
    help="latex is a tabular with the rules of booktabs; csv has the mean and the deviation in columns of their own.",
)
@click.option(
    "--against",
    type=click.Choice(["published"]),
    help="Show the runs beside the published tables of MTIL, and warn of what makes them incomparable.",
)
@click.option(
    "--order", type=click.Choice(["I", "II"]), help="With --against: show the tables of this order, not of the run's."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print {runs, summary}, or with --against {comparisons, ...}, as JSON."
)
@report_errors
@watch_option
def results(
    folders: tuple[Path, ...],
    sort: str | None,
    by_task: bool,
    by_class: str | None,
    confusion: str | None,
    worst: int,
    form: Format,
    against: str | None,
    order: str | None,
    as_json: bool,
) -> None:
    """Print and compare the results of runs.

    Several runs are compared by mean ± standard deviation over seeds. DIR is a run's folder, or any folder above
    several runs, such as `runs` or `runs/mtil/mulki`. A table that is wider than the terminal is broken into blocks.
    """
    from mulki_plugins.report.compare import comparison_data
    from mulki_plugins.report.published import published_data
    from mulki_plugins.report.tables import published_text

    _check_options(
        by_task=by_task,
        by_class=by_class,
        confusion=confusion,
        against=against,
        order=order,
        sort=sort,
        form=form,
        as_json=as_json,
    )
    runs = _find_runs(folders)
    if against and as_json:
        echo_json(published_data(runs, order))
    elif against:
        click.echo(published_text(runs, order))
    elif by_class is not None and as_json:
        from mulki_plugins.report.by_class import class_data, find_task

        echo_json(
            {
                "runs": [
                    class_data(run, kept, find_task(kept, by_class), worst) for run, kept in _with_task(runs, by_class)
                ]
            }
        )
    elif by_class is not None or confusion is not None:
        _print(_class_tables(runs, by_class, confusion, worst), form)
    elif as_json:
        echo_json(comparison_data(runs, sort))
    else:
        _print_comparison(runs, sort, by_task, form)


def _check_options(
    *,
    by_task: bool,
    by_class: str | None,
    confusion: str | None,
    against: str | None,
    order: str | None,
    sort: str | None,
    form: str,
    as_json: bool,
) -> None:
    mistakes = []
    if sort and (against or by_class is not None or confusion is not None):
        mistakes.append("--sort is for the comparison of runs; leave it out")
    if by_task and as_json:
        mistakes.append("--by-task has no JSON; --json has the accuracy on each task anyway")
    if order and not against:
        mistakes.append("--order needs --against; type: mulki results DIR --against published --order II")
    given = {
        "--by-task": by_task, "--by-class": by_class is not None, "--confusion": confusion is not None,
        "--against": against is not None,
    }  # fmt: skip
    views = [name for name, is_given in given.items() if is_given]
    if len(views) > 1:
        mistakes.append(f"{' and '.join(views)} show different tables; give one of them")
    if form != "text" and as_json:
        mistakes.append(f"--format {form} and --json exclude each other")
    if form != "text" and against:
        mistakes.append(f"--format {form} is not for --against; use --json, which has all its numbers")
    if confusion is not None and as_json:
        mistakes.append("--confusion has no JSON; use --format csv")
    if mistakes:
        raise Mistakes(mistakes)


def _find_runs(folders: Sequence[Path]) -> list[Result]:
    from mulki_plugins.report.result import find_results, runs_moved_aside

    runs, errors = find_results(folders)
    for line in errors:
        echo_note(f"warning: left out: {line}")
    if aside := runs_moved_aside(folders):
        names = ", ".join(map(str, aside[:NAMED])) + (f" and {len(aside) - NAMED} more" if len(aside) > NAMED else "")
        echo_note(f"note: left out: {names}: later runs replaced them; name their folders to see them")
    return runs


def _with_predictions(runs: Sequence[Result]) -> list[tuple[Result, Predictions]]:
    """The runs with what they predicted; those that kept nothing are named. MulkiError if none did."""
    from mulki_plugins.report.predictions import read_predictions

    found = []
    for run in runs:
        if (kept := read_predictions(Path(run.folder))) is not None:
            found.append((run, kept))
        else:
            echo_note(f"note: left out: {run.folder}: it kept no predictions")
    if not found:
        raise MulkiError(
            "none of these runs kept what it predicted",
            "run them again with this version and evaluate.predictions=true, which is the default",
        )
    return found


def _with_task(runs: Sequence[Result], task: str) -> list[tuple[Result, Predictions]]:
    """The runs with predictions for a task of this name; the others are named. MulkiError if no run has it."""
    from mulki_plugins.report.by_class import find_task

    found = _with_predictions(runs)
    if not any(task in kept.tasks for _, kept in found):
        find_task(max((kept for _, kept in found), key=lambda kept: len(kept.tasks)), task)
    for run, kept in found:
        if task not in kept.tasks:
            echo_note(f"note: left out: {run.folder}: it has no task {task}")
    return [(run, kept) for run, kept in found if task in kept.tasks]


def _class_tables(runs: Sequence[Result], by_class: str | None, confusion: str | None, worst: int) -> list[Table]:
    from mulki_plugins.report.by_class import class_tables, confusion_table, find_task
    from mulki_plugins.report.tables import heading

    tables: list[Table] = []
    name = by_class if by_class is not None else confusion or ""
    for run, kept in _with_task(runs, name):
        task = find_task(kept, name)
        title = printable(f"{heading(run)}: {kept.tasks[task]}, after {kept.rows[-1]}")
        if by_class is not None:
            tables += class_tables(run, kept, task, worst, title)
        else:
            tables.append(confusion_table(kept, task, title))
    return tables


def _print_comparison(runs: Sequence[Result], sort: str | None, by_task: bool, form: Format) -> None:
    from mulki_plugins.report.compare import groups, sorted_groups
    from mulki_plugins.report.tables import by_task_tables, comparison_text, matrix_data, notes_on, summary_table

    if form == "text" and not by_task:
        click.echo(comparison_text(runs, sort))
        return
    compared = sorted_groups(groups(runs), sort)
    if len(runs) == 1 and not by_task:
        _print([matrix_data(runs[0])], form)
        return
    for run in runs:
        if run.status != "complete":
            echo_note(f"note: left out: {run.folder}: {run.status}")
    if not compared:
        raise MulkiError("none of these runs is complete", "name a single run to see its matrix so far")
    _print(by_task_tables(compared) if by_task else [summary_table(compared, units=form != "csv")], form)
    for note in notes_on(runs, compared):
        echo_note(f"note: {note}")


def _print(tables: Sequence[Table], form: Format) -> None:
    from mulki_plugins.report.formats import render, terminal_width

    click.echo(render(tables, form, terminal_width()))
