"""`mulki resume`: goes on with a run that was stopped or killed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from mulki_plugins.cli.common import echo_json, reports_mistakes, resolved
from mulki_plugins.errors import MulkiError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--force", is_flag=True, help="Go on although recipe, data, code or versions have changed since.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
@reports_mistakes
def resume(folder: Path, force: bool, as_json: bool) -> None:
    """Go on with the run in DIR, from its latest whole checkpoint, to the very result that it would have had.

    DIR is the folder of one run, such as runs/mtil/mulki/seed-0. The recipe is the one in it.
    """
    from mulki_plugins.recipe.resolve import Changes

    path = folder / "recipe.yaml"
    if not path.is_file():
        raise MulkiError(
            f"{folder}: no run is there: it has no recipe.yaml", "give a run's folder, such as runs/mtil/mulki/seed-0"
        )
    recipe = resolved(str(path), Changes())
    if len(recipe.recipe.seeds) != 1:
        raise MulkiError(
            f"{path}: $.seeds: expected the one seed of the run", "`mulki run RECIPE --resume` goes on with several"
        )
    from mulki_plugins.report.compare import comparison_data, comparison_text
    from mulki_plugins.training.experiment import resume_experiment

    with contextlib.redirect_stdout(sys.stderr):  # whatever a plugin prints is no result
        result = resume_experiment(recipe, recipe.recipe.seeds[0], folder, force=force)
    if as_json:
        echo_json(comparison_data([result]))
    else:
        click.echo(comparison_text([result]))
