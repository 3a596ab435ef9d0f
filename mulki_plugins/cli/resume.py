"""`mulki resume`: continue a run that was stopped or killed."""

from __future__ import annotations

import contextlib
import glob
import shlex
import sys
from pathlib import Path

import click

from mulki_plugins.cli.common import (
    UserPath,
    echo_json,
    echo_note,
    import_with_notice,
    report_errors,
    resolve_recipe,
    verbosity_options,
)
from mulki_plugins.errors import Mistakes, MulkiError
from mulki_plugins.ranks.check import check_ranks
from mulki_plugins.ranks.session import fall_silent, joined

RECIPE = "recipe.yaml"
NAMED = 10
"""Runs that are named at most if the user must choose one."""


@click.command()
@click.argument("folder", type=UserPath(path_type=Path), metavar="DIR")
@click.option("--force", is_flag=True, help="Continue even if recipe, data, code or versions have changed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
@verbosity_options
@report_errors
def resume(folder: Path, force: bool, as_json: bool, verbosity: int) -> None:
    """Continue the run in DIR from its latest complete checkpoint. The result is the same as without the interruption.

    DIR is the folder of one run, such as runs/mtil/mulki-plus/seed-0, or one above a single run. The run's own recipe is
    used.
    """
    from mulki_plugins.recipe.resolve import Changes
    from mulki_plugins.report.compare import comparison_data
    from mulki_plugins.report.folder import named
    from mulki_plugins.report.tables import comparison_text

    fall_silent()
    folder = named(_find_run(_with_other_settings(folder)))  # the folder `.` may be moved aside, and `.` with it
    path = folder / RECIPE
    recipe = resolve_recipe(str(path), Changes())
    if len(recipe.recipe.seeds) != 1:
        raise MulkiError(
            f"{path}: $.seeds: expected the one seed of the run", "`mulki run RECIPE --resume` continues several"
        )
    check_ranks([recipe])
    import_with_notice(verbosity)
    from mulki_plugins.training.resume import resume_experiment

    with joined(recipe.recipe.device):
        with contextlib.redirect_stdout(sys.stderr):  # output of plugins is no result
            result = resume_experiment(recipe, recipe.recipe.seeds[0], folder, force=force, verbosity=verbosity)
        if as_json:
            echo_json(comparison_data([result]))
        else:
            click.echo(comparison_text([result]))


def _find_run(path: Path) -> Path:
    """The folder of the run: the path itself, the run that the path is a file of, or the only (unfinished) run below it."""
    from mulki_plugins.report.folder import holds_run, is_aside
    from mulki_plugins.report.result import FILE

    for folder in (path, *path.parents[:2]):  # the path may be a file of a run, or one of its checkpoints
        if (folder / RECIPE).is_file() and (folder == path or (folder / FILE).is_file()):
            if not holds_run(folder):
                hint = f"`mulki run {shlex.quote(str(folder / RECIPE))}` starts one"
                raise MulkiError(f"{folder}: it holds a recipe, but no run to resume", hint)
            return folder
    if not path.is_dir():
        raise MulkiError(f"{path}: no such folder", "relative paths start in the current folder")
    runs = sorted(file.parent for file in path.rglob(RECIPE) if (file.parent / FILE).is_file())
    runs = [run for run in runs if not any(is_aside(folder) for folder in (run, *run.parents))]
    if not runs:
        raise MulkiError(
            f"{path}: no run here: it has no {RECIPE}", "give a run's folder, such as runs/mtil/mulki-plus/seed-0"
        )
    unfinished = [run for run in runs if _status(run / FILE) != "complete"]
    if len(runs) > 1 and len(unfinished) != 1:
        raise Mistakes(_choices(path, runs, unfinished))
    run = unfinished[0] if unfinished else runs[0]
    echo_note(f"{path}: continuing {run}, the only {'unfinished ' if len(runs) > 1 else ''}run below it")
    return run


def _choices(path: Path, runs: list[Path], unfinished: list[Path]) -> list[str]:
    """An error that lists the commands to choose from."""
    which = "unfinished runs are below it" if unfinished else "runs are below it, all of them complete"
    runs = unfinished or runs
    lines = [f"  mulki resume {shlex.quote(str(run))}" for run in runs[:NAMED]]
    if len(runs) > NAMED:
        lines[-1] += f" and {len(runs) - NAMED} more"
    return [f"{path}: {len(runs)} {which}; type one of:", *lines]


def _status(path: Path) -> str:
    from mulki_plugins.report.result import read_result

    try:
        return read_result(path).status
    except MulkiError:
        return "unreadable"


def _with_other_settings(folder: Path) -> Path:
    """If the folder has no run: the only run beside it with other settings, `<strategy>+<settings>`."""
    if (folder / RECIPE).is_file() or not folder.name.startswith("seed-"):
        return folder
    pattern = f"{glob.escape(folder.parent.name)}+*/{glob.escape(folder.name)}/{RECIPE}"
    runs = sorted(path.parent for path in folder.parent.parent.glob(pattern))
    if len(runs) > 1:
        names = ", ".join(map(str, runs))
        raise MulkiError(f"{folder}: no run here, but runs with other settings are beside it", f"give one of {names}")
    if runs:
        echo_note(f"{folder}: no run here; continuing the one beside it, {runs[0]}")
    return runs[0] if runs else folder
