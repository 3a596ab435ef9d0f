"""`mulki show`: print a resolved recipe with the origin of each value."""

from __future__ import annotations

from typing import Any

import click

from mulki_plugins.cli.common import echo_json, echo_recipe, read_changes, recipe_options, report_errors, resolve_recipe


@click.command()
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print {recipe, origins} as JSON.")
@report_errors
def show(recipe: str, as_json: bool, **options: Any) -> None:
    """Print RECIPE as it will run.

    The output includes the strategy's stack, all defaults, and the origin of each value. It is itself a recipe:
    `mulki show mtil > mine.yaml`.
    """
    from mulki_plugins.recipe.emit import dump_annotated, list_origins

    result = resolve_recipe(recipe, read_changes(options))
    if as_json:
        echo_json({"recipe": result.tree.value, "origins": list_origins(result.tree)})
    else:
        echo_recipe(dump_annotated(result.tree))
