"""`mulki run`: trains and evaluates a recipe, once for each seed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.cli.common import changes_from, echo_json, recipe_options, reports_mistakes, resolved
from mulki_plugins.errors import plain

if TYPE_CHECKING:
    from mulki_plugins.recipe.resolve import Resolved
    from mulki_plugins.recipe.schema import Choice


@click.command()
@recipe_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Folder below which the run's own folder RECIPE/STRATEGY/seed-N is made.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of tables.")
@reports_mistakes
def run(recipe: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train the model of RECIPE on one task after another, and evaluate it on all of them after each.

    RECIPE is a path, or the name of an installed recipe: `mulki run mtil`. Progress goes to stderr, results to stdout.
    """
    result = resolved(recipe, changes_from(options))
    if dry_run:
        _say_what_would_be_done(result, out, as_json)
        return
    from mulki_plugins.report.compare import comparison_data, comparison_text
    from mulki_plugins.training.experiment import run_experiment

    finished = []
    for seed in result.recipe.seeds:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a plugin prints is no result
            finished.append(run_experiment(result, seed, out))
        if not as_json:
            click.echo(comparison_text(finished[-1:]))
    if as_json:
        echo_json(comparison_data(finished))
    elif len(finished) > 1:
        click.echo("\n" + comparison_text(finished))


def _say_what_would_be_done(result: Resolved, out: Path, as_json: bool) -> None:
    from mulki_plugins.report.folder import run_folder

    recipe = result.recipe
    folders = [str(run_folder(out, recipe, seed)) for seed in recipe.seeds]
    if as_json:
        echo_json({"recipe": result.tree.value, "folders": folders})
        return
    budget = f"{recipe.train.iterations} iterations" if recipe.train.iterations else f"{recipe.train.epochs} epochs"
    if recipe.strategy.base == "none":
        budget = "no training"
    stack = ", ".join(entry.name for entry in recipe.strategy.plugins) or "no plugins"
    click.echo(f"recipe    {recipe.name}{': ' if recipe.summary else ''}{plain(recipe.summary)}")
    click.echo(f"stream    {_said(recipe.stream)}")
    click.echo(f"model     {_said(recipe.model)}")
    click.echo(f"strategy  {recipe.strategy.name}: {stack}")
    click.echo(f"training  {budget} of {recipe.train.batch_size} images a task, lr {recipe.train.optimizer.lr:g}")
    for folder in folders:
        click.echo(f"folder    {plain(folder)}")


def _said(choice: Choice) -> str:
    """A stream or model with the options that are set."""
    options = [f"{key}: {value}" for key, value in choice.options.items() if value is not None]
    return plain(f"{choice.name} ({', '.join(options)})" if options else choice.name)
