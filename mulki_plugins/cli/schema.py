"""`mulki schema`: what an editor needs to complete and check a recipe while it is written."""

from __future__ import annotations

import click

from mulki_plugins.cli.common import echo_json, reports_mistakes


@click.command()
@click.argument("kind", type=click.Choice(("recipe", "strategy")), default="recipe")
@reports_mistakes
def schema(kind: str) -> None:
    """Print the JSON Schema of a recipe, or of a strategy, with everything that is installed.

    `mulki schema > recipe.schema.json`, and as the first line of a recipe `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from mulki_plugins.recipe.json_schema import recipe_schema, strategy_schema
    from mulki_plugins.registry.builtin import open_clip_models

    make = recipe_schema if kind == "recipe" else strategy_schema
    echo_json(make(open_clip_models() or None))
