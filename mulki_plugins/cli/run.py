"""`mulki run`: trains and evaluates a recipe, once for each strategy and seed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import all_resolved, echo_json, recipe_options, reports_mistakes, variants_from
from mulki_plugins.errors import MulkiError

if TYPE_CHECKING:
    from mulki_plugins.recipe.resolve import Changes, Resolution
    from mulki_plugins.recipe.schema import Choice, Recipe


@click.command()
@recipe_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Folder below which the run's own folder RECIPE/STRATEGY/seed-N is made; other settings have their own.",
)
@click.option("--name", metavar="NAME", help="Name the run's folder in the strategy's place: RECIPE/NAME/seed-N.")
@click.option(
    "--resume", is_flag=True, help="Go on with runs that were stopped; those that are complete are not run again."
)
@click.option(
    "--force", is_flag=True, help="With --resume: go on although recipe, data, code or versions have changed."
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of tables.")
@reports_mistakes
def run(
    recipe: str,
    out: Path,
    name: str | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train the model of RECIPE on one task after another, and evaluate it on all of them after each.

    RECIPE is a path, or the name of an installed recipe: `mulki run mtil`. With several strategies and seeds each strategy
    runs with each seed. Progress goes to stderr, results to stdout.
    """
    variants = variants_from(options)
    planned = _planned(recipe, variants, all_resolved(recipe, variants), out, name, resume)
    if dry_run:
        _say_what_would_be_done(planned, as_json)
        return
    from mulki_plugins.report.compare import comparison_data, comparison_text
    from mulki_plugins.training.resume import resume_experiment
    from mulki_plugins.training.run import run_experiment

    finished = []
    for result, folders in planned:
        for seed, folder in folders.items():
            with contextlib.redirect_stdout(sys.stderr):  # whatever a plugin prints is no result
                if resume and folder.is_dir():
                    finished.append(resume_experiment(result, seed, folder, force=force))
                else:
                    finished.append(run_experiment(result, seed, out, folder=folder))
            if not as_json:
                click.echo(comparison_text(finished[-1:]))
    if as_json:
        echo_json(comparison_data(finished))
    elif len(finished) > 1:
        click.echo("\n" + comparison_text(finished))


def _planned(
    recipe: str, variants: list[Changes], results: list[Resolution], out: Path, name: str | None, resuming: bool
) -> list[tuple[Resolution, dict[int, Path]]]:
    """The folder of each strategy's runs, by seed. MulkiError where two would share one."""
    from mulki_plugins.recipe.check import check_name
    from mulki_plugins.recipe.settings import variant
    from mulki_plugins.report.folder import choose_folder

    if name is not None and (problem := check_name(name)):
        raise MulkiError(f"--name: {problem}")
    planned: list[tuple[Resolution, dict[int, Path]]] = []
    taken: set[Path] = set()
    for changes, result in zip(variants, results, strict=True):
        label = variant(recipe, changes, result.recipe)
        folders = {
            seed: choose_folder(out, result.recipe, seed, variant=label, name=name or "", resuming=resuming)
            for seed in result.recipe.seeds
        }
        if taken & set(folders.values()):
            hint = "run them one after another" if name else "name each strategy once"
            raise MulkiError(f"two of these strategies would run in {next(iter(folders.values()))}", hint)
        taken |= set(folders.values())
        planned.append((result, folders))
    return planned


def _say_what_would_be_done(planned: list[tuple[Resolution, dict[int, Path]]], as_json: bool) -> None:
    if as_json:
        said = [
            {"recipe": result.tree.value, "folders": [str(folder) for folder in folders.values()]}
            for result, folders in planned
        ]
        echo_json(said[0] if len(said) == 1 else {"runs": said})
        return
    for i, (result, folders) in enumerate(planned):
        if i:
            click.echo()
        _say_what_one_would_do(result.recipe, folders)


def _say_what_one_would_do(recipe: Recipe, folders: dict[int, Path]) -> None:
    budget = f"{recipe.train.iterations} iterations" if recipe.train.iterations else f"{recipe.train.epochs} epochs"
    if recipe.strategy.base == "none":
        budget = "no training"
    stack = ", ".join(entry.name for entry in recipe.strategy.plugins) or "no plugins"
    click.echo(f"recipe    {recipe.name}{': ' if recipe.summary else ''}{printable(recipe.summary)}")
    click.echo(f"stream    {_said(recipe.stream)}")
    click.echo(f"model     {_said(recipe.model)}")
    click.echo(f"strategy  {recipe.strategy.name}: {stack}")
    click.echo(f"training  {budget} of {recipe.train.batch_size} images a task, lr {recipe.train.optimizer.lr:g}")
    for folder in folders.values():
        click.echo(f"folder    {printable(str(folder))}")


def _said(choice: Choice) -> str:
    """A stream or model with the options that are set."""
    options = [f"{key}: {_short(value)}" for key, value in choice.options.items() if value is not None]
    return printable(f"{choice.name} ({', '.join(options)})" if options else choice.name)


def _short(value: Any) -> Any:
    """Of a list of mappings their names."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return ", ".join(str(item["name"]) for item in value)
    return value
