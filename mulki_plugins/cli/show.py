"""`mulki show`: the recipe as it will run, every value with its origin."""

from __future__ import annotations

from typing import Any

import click

from mulki_plugins.cli.common import changes_from, echo_json, echo_recipe, recipe_options, reports_mistakes, resolved


@click.command()
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print {recipe, origins} as JSON.")
@reports_mistakes
def show(recipe: str, as_json: bool, **options: Any) -> None:
    """Print RECIPE as it will run: with its strategy's stack, all defaults, and where each value comes from.

    What is printed is itself a recipe: `mulki show mtil > mine.yaml`.
    """
    from mulki_plugins.recipe.emit import dump_annotated, list_origins

    result = resolved(recipe, changes_from(options))
    if as_json:
        echo_json({"recipe": result.tree.value, "origins": list_origins(result.tree)})
    else:
        echo_recipe(dump_annotated(result.tree))
