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
@click.option(
    "--resume", is_flag=True, help="Go on with runs that were stopped; those that are complete are not run again."
)
@click.option(
    "--force", is_flag=True, help="With --resume: go on although recipe, data, code or versions have changed."
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of tables.")
@reports_mistakes
def run(recipe: str, out: Path, resume: bool, force: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train the model of RECIPE on one task after another, and evaluate it on all of them after each.

    RECIPE is a path, or the name of an installed recipe: `mulki run mtil`. Progress goes to stderr, results to stdout.
    """
    result = resolved(recipe, changes_from(options))
    if dry_run:
        _say_what_would_be_done(result, out, as_json)
        return
    from mulki_plugins.report.compare import comparison_data, comparison_text
    from mulki_plugins.report.folder import run_folder
    from mulki_plugins.training.experiment import resume_experiment, run_experiment

    finished = []
    for seed in result.recipe.seeds:
        folder = run_folder(out, result.recipe, seed)
        with contextlib.redirect_stdout(sys.stderr):  # whatever a plugin prints is no result
            if resume and folder.is_dir():
                finished.append(resume_experiment(result, seed, folder, force=force))
            else:
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
    options = [f"{key}: {_short(value)}" for key, value in choice.options.items() if value is not None]
    return plain(f"{choice.name} ({', '.join(options)})" if options else choice.name)


def _short(value: Any) -> Any:
    """Of a list of mappings their names."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return ", ".join(str(item["name"]) for item in value)
    return value
