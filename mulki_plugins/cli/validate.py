"""`mulki validate`: everything that is wrong with recipes and strategies, without running or importing anything."""

from __future__ import annotations

from typing import Any

import click

from mulki_plugins.cli.common import changes_from, echo_json, recipe_options, reports_mistakes, resolved


@click.command()
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print {valid, errors} instead of text.")
@reports_mistakes
def validate(recipe: str, as_json: bool, **options: Any) -> None:
    """Check RECIPE: its syntax, its values, every name and option, and the order of the stack.

    RECIPE is a path, or the name of an installed recipe. All mistakes are reported at once, with file, line and path; the
    exit status is then 2.
    """
    from mulki_plugins.errors import Mistakes

    try:
        result = resolved(recipe, changes_from(options))
    except Mistakes as mistakes:
        if not as_json:
            raise
        echo_json({"valid": False, "errors": mistakes.lines()})
        raise SystemExit(2) from None
    if as_json:
        echo_json({"valid": True, "errors": []})
        return
    stack = [entry.name for entry in result.recipe.strategy.plugins]
    method = f"{result.recipe.strategy.name} ({', '.join(stack)})" if stack else result.recipe.strategy.name
    click.echo(
        f"{recipe}: valid; stream {result.recipe.stream.name}, model {result.recipe.model.name}, strategy {method}"
    )
