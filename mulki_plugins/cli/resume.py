"""`mulki resume`: goes on with a run that was stopped or killed."""

from __future__ import annotations

import glob
from pathlib import Path

import click

from mulki_plugins.cli.common import echo_json, reports_mistakes, resolved
from mulki_plugins.errors import MulkiError, plain


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

    folder = _of_other_settings(folder)
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

    result = resume_experiment(recipe, recipe.recipe.seeds[0], folder, force=force)
    if as_json:
        echo_json(comparison_data([result]))
    else:
        click.echo(comparison_text([result]))


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
        click.echo(plain(f"{folder}: no run is there; going on with the one beside it, {found[0]}"), err=True)
    return found[0] if found else folder
