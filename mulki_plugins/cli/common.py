"""What the commands share: the arguments that name and change a recipe, and how mistakes are reported."""

from __future__ import annotations

import functools
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.exceptions import Exit

from mulki_plugins.characters import printable
from mulki_plugins.errors import Mistakes, MulkiError, describe_error
from mulki_plugins.failures import explain_failure

if TYPE_CHECKING:
    from mulki_plugins.recipe.resolve import Changes, Resolution


PRINTED = 100
"""How many mistakes are printed."""


def reports_mistakes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A user's mistake is printed, one line each, and ends with status 2; an error that nobody foresaw ends with status 1.

    Of the latter one line is printed, and its traceback goes into a file.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MulkiError as error:
            lines = error.lines()
            for line in lines[:PRINTED]:
                click.echo(f"error: {printable(line)}", err=True)
            if len(lines) > PRINTED:
                click.echo(f"error: and {len(lines) - PRINTED} more", err=True)
            raise SystemExit(error.status) from None
        except (click.ClickException, click.Abort, Exit):
            raise
        except Exception as error:
            _report_unforeseen(error)

    return wrapper


def _report_unforeseen(error: Exception) -> NoReturn:
    """One line, and the traceback in a file of its own."""
    if (known := explain_failure(error)) is not None:
        click.echo(f"error: {printable(known[0])}; {known[1]}", err=True)
        raise SystemExit(2) from None
    click.echo(f"error: {describe_error(error)}; this was not expected, and {traceback_kept(error)}", err=True)
    raise SystemExit(1) from None


def traceback_kept(error: BaseException) -> str:
    """Where the error's traceback is: in a file of its own, or on stderr where no file can be written."""
    lines = traceback.format_exception(error)
    try:
        descriptor, path = tempfile.mkstemp(prefix="mulki-error-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
        return f"the full traceback is in {path}"
    except OSError:
        click.echo("".join(lines), err=True)
        return "the full traceback is above"


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """RECIPE, and the options that change it."""
    for decorate in (
        click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="Run this seed; may be repeated."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY.PATH=VALUE",
            help="Set a value, such as train.iterations=50 or 'stream.tasks=[digits,scans]'; may be repeated.",
        ),
        click.option("--without", "without_plugins", multiple=True, metavar="PLUGIN", help="Leave a plugin out of the stack."),
        click.option("--with", "with_plugins", multiple=True, metavar="PLUGIN", help="Add a plugin at the stack's end."),
        click.option(
            "--strategy", "strategies", multiple=True, metavar="NAME",
            help="Use this strategy in place of the recipe's; `run` and `validate` take several.",
        ),
        click.argument("recipe"),
    ):  # fmt: skip
        function = decorate(function)
    return function


def changes_from(options: dict[str, Any]) -> Changes:
    """The command line's changes, where it names at most one strategy; takes their options out of `options`."""
    changes = variants_from(options)
    if len(changes) > 1:
        raise MulkiError(
            "--strategy: this command takes one", "type it once for each; `mulki run` and `mulki validate` take several"
        )
    return changes[0]


def variants_from(options: dict[str, Any]) -> list[Changes]:
    """The command line's changes for each strategy that it names; takes their options out of `options`."""
    from mulki_plugins.recipe.resolve import Changes

    names = ("with_plugins", "without_plugins", "settings", "seeds")
    given = {name: options.pop(name) for name in names}
    strategies = options.pop("strategies")
    if twice := [name for i, name in enumerate(strategies) if name in strategies[:i]]:
        raise MulkiError(f"--strategy: {twice[0]!r} is given twice")
    return [Changes(strategy=strategy, **given) for strategy in strategies or (None,)]


def resolved(recipe: str, changes: Changes) -> Resolution:
    """The checked recipe, after its notices have been printed."""
    return all_resolved(recipe, [changes])[0]


def all_resolved(recipe: str, variants: Sequence[Changes]) -> list[Resolution]:
    """The checked recipe with each of these changes, after their notices have been printed. All mistakes at once."""
    from mulki_plugins.recipe.resolve import resolve

    results, wrong = [], []
    for changes in variants:
        try:
            results.append(resolve(recipe, changes))
        except MulkiError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise Mistakes(dict.fromkeys(line for error in wrong for line in error.lines()))
    for notice in dict.fromkeys(notice for result in results for notice in result.notices):
        click.echo(printable(notice), err=True)
    return results


def echo_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=not _takes_every_character()))


def echo_recipe(text: str) -> None:
    """A recipe, which is UTF-8 wherever it is kept: also in a file or pipe whose encoding would be another."""
    if sys.stdout.isatty() or _takes_every_character():
        click.echo(text, nl=False)
    else:
        click.echo(text.encode(errors="backslashreplace"), nl=False)


def _takes_every_character() -> bool:
    return (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")
