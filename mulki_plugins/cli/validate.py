"""`mulki validate`: everything that is wrong with recipes and strategies, without running or importing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import all_resolved, echo_json, recipe_options, reports_mistakes, variants_from
from mulki_plugins.errors import MulkiError


@click.command()
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print {valid, errors} instead of text.")
@reports_mistakes
def validate(recipe: str, as_json: bool, **options: Any) -> None:
    """Check RECIPE: its syntax, its values, every name and option, and the order of the stack.

    RECIPE is a path, or the name of an installed recipe; a file in a folder `strategies` is checked as a strategy. All
    mistakes are reported at once, with file, line and path; the exit status is then 2.
    """
    try:
        said = _strategy(recipe, options) if _is_strategy(recipe) else _recipe(recipe, options)
    except MulkiError as mistakes:
        if not as_json:
            raise
        echo_json({"valid": False, "errors": mistakes.lines()})
        raise SystemExit(2) from None
    if as_json:
        echo_json({"valid": True, "errors": []})
    else:
        click.echo(printable(f"{recipe}: valid; {said}"))


def _recipe(name: str, options: dict[str, Any]) -> str:
    from mulki_plugins.cli.sentences import check_class_names

    recipes = [result.recipe for result in all_resolved(name, variants_from(options))]
    for choice in (recipes[0].stream, recipes[0].reference):
        if choice is not None and choice.name == "folders":
            from mulki_plugins.streams.folders.tasks import unused_files

            for line in unused_files(choice.options["tasks"]):
                click.echo(printable(f"note: {line}"), err=True)
    for warning in check_class_names(recipes[0]):
        click.echo(printable(warning), err=True)
    methods = []
    for recipe in recipes:
        stack = ", ".join(entry.name for entry in recipe.strategy.plugins)
        methods.append(f"strategy {recipe.strategy.name}" + (f" ({stack})" if stack else ""))
    return f"stream {recipes[0].stream.name}, model {recipes[0].model.name}, {', '.join(methods)}"


def _is_strategy(name: str) -> bool:
    path = Path(name)
    return path.parent.name == "strategies" or (os.path.isfile(path) and path.absolute().parent.name == "strategies")


def _strategy(name: str, options: dict[str, Any]) -> str:
    if any(options.values()):
        raise MulkiError(f"{name}: a strategy is checked on its own", "the options that change a recipe go with one")
    from mulki_plugins.recipe.files import check_strategy, find

    strategy = check_strategy(find("strategies", name))
    return f"strategy {strategy.name} ({', '.join(entry.name for entry in strategy.plugins) or 'no plugins'})"
