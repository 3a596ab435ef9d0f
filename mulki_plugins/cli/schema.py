"""`mulki schema`: print a JSON Schema, with which an editor completes and checks recipes."""

from __future__ import annotations

import click

from mulki_plugins.cli.common import echo_json, report_errors


@click.command()
@click.argument("kind", type=click.Choice(("recipe", "strategy", "study")), default="recipe")
@report_errors
def schema(kind: str) -> None:
    """Print the JSON Schema of a recipe, a strategy or a study.

    It includes all installed parts. Run `mulki schema > recipe.schema.json` and begin a recipe with
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from mulki_plugins.recipe.json_schema import recipe_schema, strategy_schema
    from mulki_plugins.registry.builtin import open_clip_models

    if kind == "study":
        from mulki_plugins.study.json_schema import study_schema

        echo_json(study_schema())
        return
    make_schema = recipe_schema if kind == "recipe" else strategy_schema
    echo_json(make_schema(open_clip_models() or None))
