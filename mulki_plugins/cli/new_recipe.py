"""`mulki new recipe`: a recipe for the user's own folders of images."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import echo_recipe, reports_mistakes
from mulki_plugins.errors import MulkiError


@click.command("recipe")
@click.argument("folders", nargs=-1, metavar="DIR...")
@click.option("--from-folders", is_flag=True, hidden=True, help="As without it.")
@click.option("--out", metavar="FILE", help="Where to write it; - is stdout. Default: NAME.yaml in the current folder.")
@click.option("--name", metavar="NAME", help="The recipe's name. Default: made of the folders' names.")
@reports_mistakes
def new_recipe(folders: tuple[str, ...], from_folders: bool, out: str | None, name: str | None) -> None:
    """Write a recipe that learns your own images, one task for each DIR, in this order.

    DIR holds a folder of images for each class, of which a fifth is held out for the test, or `train` and `test` (or
    `val`), each with such folders. Classes are called as their folders; the recipe says how, to be corrected there.
    A folder without images is left out of the classes, and the recipe says so.

    \b
    mulki new recipe data/birds data/mushrooms --out mine.yaml
    mulki run mine.yaml
    """
    from mulki_plugins.streams.folders.draft import draft

    if not folders:
        raise MulkiError("expected the folders of the tasks", "type: mulki new recipe DIR...")
    drafted = draft(folders, name)
    for notice in drafted.notices:
        click.echo(printable(f"note: {notice}"), err=True)
    if out == "-":
        echo_recipe(drafted.text(f"{drafted.name}.yaml"))
        return
    path = Path(out or f"{drafted.name}.yaml")
    _write(path, drafted.text(str(path)))
    for note in _too_long(path):
        click.echo(printable(f"note: {note}"), err=True)
    click.echo(printable(f"{path}: written; check the class names in it, then: mulki run {shlex.quote(str(path))}"))


def _too_long(path: Path) -> list[str]:
    """What the recipe's model does not read of the class names."""
    from mulki_plugins.cli.sentences import check_class_names
    from mulki_plugins.recipe.resolve import resolve

    try:
        return check_class_names(resolve(str(path)).recipe)
    except MulkiError as error:
        return error.lines()


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise MulkiError(f"{path}: is there already, and is not overwritten", "choose another with --out") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MulkiError(f"{path}: cannot be written: {reason}", "choose another with --out") from error
