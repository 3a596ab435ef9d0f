"""`mulki resume`: goes on with a run that was stopped or killed."""

from __future__ import annotations

import contextlib
import glob
import shlex
import sys
from pathlib import Path

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import echo_json, reports_mistakes, resolved
from mulki_plugins.errors import Mistakes, MulkiError

RECIPE = "recipe.yaml"
NAMED = 10
"""So many runs are named where one must be chosen."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--force", is_flag=True, help="Go on although recipe, data, code or versions have changed since.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
@reports_mistakes
def resume(folder: Path, force: bool, as_json: bool) -> None:
    """Go on with the run in DIR, from its latest whole checkpoint, to the very result that it would have had.

    DIR is the folder of one run, such as runs/mtil/mulki/seed-0, or one above a single run. The recipe is the one in it.
    """
    from mulki_plugins.recipe.resolve import Changes

    folder = _run_in(_of_other_settings(folder))
    path = folder / RECIPE
    recipe = resolved(str(path), Changes())
    if len(recipe.recipe.seeds) != 1:
        raise MulkiError(
            f"{path}: $.seeds: expected the one seed of the run", "`mulki run RECIPE --resume` goes on with several"
        )
    from mulki_plugins.report.compare import comparison_data, comparison_text
    from mulki_plugins.training.resume import resume_experiment

    with contextlib.redirect_stdout(sys.stderr):  # whatever a plugin prints is no result
        result = resume_experiment(recipe, recipe.recipe.seeds[0], folder, force=force)
    if as_json:
        echo_json(comparison_data([result]))
    else:
        click.echo(comparison_text([result]))


def _run_in(folder: Path) -> Path:
    """The folder of the run that is meant: this one, the one that a file lies in, or the only one below. MulkiError."""
    from mulki_plugins.report.folder import is_aside
    from mulki_plugins.report.result import FILE

    for around in (folder, *folder.parents[:2]):  # also a file of a run, or one of its checkpoints
        if (around / RECIPE).is_file() and (around == folder or (around / FILE).is_file()):
            return around
    if not folder.is_dir():
        raise MulkiError(f"{folder}: there is no such folder", "a path begins in the current folder")
    below = sorted(path.parent for path in folder.rglob(RECIPE) if (path.parent / FILE).is_file())
    below = [run for run in below if not any(is_aside(part) for part in (run, *run.parents))]
    if not below:
        raise MulkiError(
            f"{folder}: no run is there: it has no {RECIPE}", "give a run's folder, such as runs/mtil/mulki/seed-0"
        )
    states = {run: _state(run / FILE) for run in below}
    unfinished = [run for run, state in states.items() if state != "complete"]
    if len(below) > 1 and len(unfinished) != 1:
        many = len(unfinished) or len(below)
        named = "\n  ".join(f"mulki resume {shlex.quote(str(run))}" for run in (unfinished or below)[:NAMED])
        more = f" and {many - NAMED} more" if many > NAMED else ""
        what = "unfinished runs are below it" if unfinished else "runs are below it, all of them complete"
        raise Mistakes([f"{folder}: {many} {what}; type one of:", *f"  {named}{more}".split("\n")])
    run = unfinished[0] if unfinished else below[0]
    click.echo(
        printable(f"{folder}: going on with {run}, the only {'unfinished ' if len(below) > 1 else ''}run below it"),
        err=True,
    )
    return run


def _state(path: Path) -> str:
    from mulki_plugins.report.result import read_result

    try:
        return read_result(path).status
    except MulkiError:
        return "unreadable"


def _of_other_settings(folder: Path) -> Path:
    """Where no run is in a folder, the only one that is beside it for the settings that it was run with."""
    if (folder / "recipe.yaml").is_file() or not folder.name.startswith("seed-"):
        return folder
    pattern = f"{glob.escape(folder.parent.name)}+*/{glob.escape(folder.name)}/recipe.yaml"
    found = sorted(path.parent for path in folder.parent.parent.glob(pattern))
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise MulkiError(f"{folder}: no run is there, but runs of other settings are beside it", f"give one of {names}")
    if found:
        click.echo(printable(f"{folder}: no run is there; going on with the one beside it, {found[0]}"), err=True)
    return found[0] if found else folder
