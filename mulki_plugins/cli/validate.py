"""`mulki validate`: report all mistakes in a recipe or a strategy, without running anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import (
    echo_json,
    echo_note,
    read_variants,
    recipe_options,
    report_errors,
    resolve_variants,
)
from mulki_plugins.errors import MulkiError

if TYPE_CHECKING:
    from mulki_plugins.recipe.schema import Choice, Recipe


@click.command()
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print {valid, errors} as JSON.")
@report_errors
def validate(recipe: str, as_json: bool, **options: Any) -> None:
    """Check RECIPE and report all mistakes at once.

    It checks the syntax, values, every name and option, and the order of the stack. RECIPE is a path or the name of
    an installed recipe. A file in a folder called `strategies` or `studies`, or with the keys of one, is checked as a
    strategy or a study. Each mistake is reported with file, line and path; the exit status is then 2.
    """
    try:
        kind = _kind_of(recipe)
        if kind == "studies":
            summary = _check_study(recipe, options)
        elif kind == "strategies":
            summary = _check_strategy(recipe, options)
        else:
            summary = _check_recipe(recipe, options)
    except MulkiError as error:
        if not as_json:
            raise
        echo_json({"valid": False, "errors": error.lines()})
        raise SystemExit(2) from None
    if as_json:
        echo_json({"valid": True, "errors": []})
    else:
        click.echo(printable(f"{recipe}: valid; {summary}"))


def _check_recipe(name: str, options: dict[str, Any]) -> str:
    recipes = [result.recipe for result in resolve_variants(name, read_variants(options))]
    for choice in (recipes[0].stream, recipes[0].reference):
        for tasks in _own_tasks(choice) if choice is not None else ():
            from mulki_plugins.streams.folders.tasks import unused_files

            for line in unused_files(tasks):
                echo_note(f"note: {line}")
    for warning in check_class_names(recipes[0]):
        echo_note(warning)
    strategies = []
    for recipe in recipes:
        stack = ", ".join(entry.name for entry in recipe.strategy.plugins)
        strategies.append(f"strategy {recipe.strategy.name}" + (f" ({stack})" if stack else ""))
    return f"stream {recipes[0].stream.name}, model {recipes[0].model.name}, {', '.join(strategies)}"


def check_class_names(recipe: Recipe) -> list[str]:
    """Warnings about class names that the model truncates. Mistakes if two classes become the same text.

    Checks only streams `folders`, whose class names are the user's, also inside others, and models with CLIP's tokenizer; it
    needs no torch. A run checks every stream and model.
    """
    if not (own := _own_tasks(recipe.stream)):
        return []
    from mulki_plugins.models.text import byte_pairs_of, check_sentences
    from mulki_plugins.streams.folders.tasks import read_texts

    pairs = byte_pairs_of(recipe.model.name)
    if pairs is None:
        return []
    across = recipe.evaluate.classes != "task" or recipe.stream.name == "split"
    return check_sentences([task for tasks in own for task in read_texts(tasks)], pairs.read, across=across)


def _own_tasks(stream: Choice) -> list[Any]:
    """What each stream `folders` declares: the stream itself, or those inside `split` and `mixed`."""
    from mulki_plugins.streams.nested import innermost

    inside = innermost({"name": stream.name, **stream.options})
    return [each["tasks"] for each in inside if each["name"] == "folders"]


def _kind_of(name: str) -> str:
    """What the file is checked as: what its folder says, else what its keys say, else a recipe."""
    for folder in ("studies", "strategies"):
        if _is_in_folder(name, folder):
            return folder
    if not os.path.isfile(name):
        return "recipes"
    from mulki_plugins.recipe.files import kind_of
    from mulki_plugins.recipe.yaml import read_yaml

    try:
        return kind_of(read_yaml(Path(name), name).value) or "recipes"
    except MulkiError:  # reported when it is read as a recipe
        return "recipes"


def _is_in_folder(name: str, folder: str) -> bool:
    path = Path(name)
    return path.parent.name == folder or (os.path.isfile(path) and path.absolute().parent.name == folder)


def _check_study(name: str, options: dict[str, Any]) -> str:
    if any(options.values()):
        raise MulkiError(f"{name}: a study is checked without options", "--set, --with and the like change a recipe")
    from mulki_plugins.study.plan import choice_jobs, reported_jobs_of_any_choice
    from mulki_plugins.study.read import read_study

    study = read_study(name).study
    runs = sum(1 for _ in reported_jobs_of_any_choice(study))
    candidates = sum(1 for _ in choice_jobs(study))
    what = f"study {study.name}, {runs} run{'s' if runs != 1 else ''}"
    return what + (f", {candidates} to choose settings" if candidates else "")


def _check_strategy(name: str, options: dict[str, Any]) -> str:
    if any(options.values()):
        raise MulkiError(f"{name}: a strategy is checked without options", "--set, --with and the like change a recipe")
    from mulki_plugins.recipe.files import check_strategy, find

    strategy = check_strategy(find("strategies", name))
    return f"strategy {strategy.name} ({', '.join(entry.name for entry in strategy.plugins) or 'no plugins'})"
