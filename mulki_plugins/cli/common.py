"""Shared by the commands: the options that name and change a recipe, the report of errors, printing."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.exceptions import Exit

from mulki_plugins.characters import printable
from mulki_plugins.cli.complete import complete_plugins, complete_recipes, complete_settings, complete_strategies
from mulki_plugins.errors import Mistakes, MulkiError, describe_error
from mulki_plugins.failures import explain_failure

if TYPE_CHECKING:
    from mulki_plugins.recipe.resolve import Changes, Resolution


MOST_ERRORS = 100
"""Errors printed at most."""
SOME_UNREADABLE = 3
"""The exit status if some images could not be read."""


def report_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print a user's mistakes, one line each, and exit with status 2. An unexpected error exits with status 1.

    Of an unexpected error one line is printed; its traceback goes into a file.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MulkiError as error:
            lines = error.lines()
            for line in lines[:MOST_ERRORS]:
                click.echo(f"error: {printable(line)}", err=True)
            if len(lines) > MOST_ERRORS:
                click.echo(f"error: and {len(lines) - MOST_ERRORS} more", err=True)
            raise SystemExit(error.status) from None
        except (click.ClickException, click.Abort, Exit):
            raise
        except Exception as error:
            _report_other_error(error)

    return wrapper


def _report_other_error(error: Exception) -> NoReturn:
    if (explanation := explain_failure(error)) is not None:
        click.echo(f"error: {printable(explanation[0])}; {explanation[1]}", err=True)
        raise SystemExit(2) from None
    click.echo(f"error: {describe_error(error)}; this is unexpected, and {save_traceback(error)}", err=True)
    raise SystemExit(1) from None


def save_traceback(error: BaseException) -> str:
    """Write the traceback to a new file, or to stderr if that fails. Returns a phrase that says where it is."""
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
    """The argument RECIPE and the options that change it."""
    for decorate in (
        click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="Run this seed; repeatable."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY.PATH=VALUE", shell_complete=complete_settings,
            help="Set a value, such as train.iterations=50 or 'stream.tasks=[digits,scans]'; repeatable.",
        ),
        click.option(
            "--without", "without_plugins", multiple=True, metavar="PLUGIN", shell_complete=complete_plugins,
            help="Remove a plugin from the stack.",
        ),
        click.option(
            "--with", "with_plugins", multiple=True, metavar="PLUGIN", shell_complete=complete_plugins,
            help="Add a plugin to the stack, where it belongs.",
        ),
        click.option(
            "--strategy", "strategies", multiple=True, metavar="NAME", shell_complete=complete_strategies,
            help="Use this strategy instead of the recipe's; repeatable with `run` and `validate`.",
        ),
        click.argument("recipe", shell_complete=complete_recipes),
    ):  # fmt: skip
        function = decorate(function)
    return function


def read_changes(options: dict[str, Any]) -> Changes:
    """The command line's changes to the recipe, with at most one strategy. Removes their options from `options`."""
    variants = read_variants(options)
    if len(variants) > 1:
        raise MulkiError(
            "--strategy: this command takes one strategy",
            "call it once for each; `mulki run` and `mulki validate` take several",
        )
    return variants[0]


def read_variants(options: dict[str, Any]) -> list[Changes]:
    """The command line's changes to the recipe for each strategy it names. Removes their options from `options`."""
    from mulki_plugins.recipe.resolve import Changes

    changes = {name: options.pop(name) for name in ("with_plugins", "without_plugins", "settings", "seeds")}
    strategies = options.pop("strategies")
    if repeated := [name for i, name in enumerate(strategies) if name in strategies[:i]]:
        raise MulkiError(f"--strategy: {repeated[0]!r} is given twice")
    return [Changes(strategy=strategy, **changes) for strategy in strategies or (None,)]


def resolve_recipe(recipe: str, changes: Changes) -> Resolution:
    """Resolve and check the recipe, and print its notices."""
    return resolve_variants(recipe, [changes])[0]


def resolve_variants(recipe: str, variants: Sequence[Changes]) -> list[Resolution]:
    """Resolve and check the recipe with each of these changes, and print the notices. Raises all mistakes at once."""
    from mulki_plugins.recipe.resolve import resolve

    results: list[Resolution] = []
    errors: list[MulkiError] = []
    for changes in variants:
        try:
            results.append(resolve(recipe, changes))
        except MulkiError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Mistakes(dict.fromkeys(line for error in errors for line in error.lines()))
    for notice in dict.fromkeys(notice for result in results for notice in result.notices):
        echo_note(notice)
    return results


def import_with_notice(verbosity: int = 0) -> float:
    """Import the libraries that train, which takes seconds, after a line on stderr. Returns the seconds."""
    from mulki_plugins.libraries import PACKAGES, import_libraries

    if verbosity >= 0 and not all(name in sys.modules for name in PACKAGES):
        echo_note("importing torch and Avalanche")
    began = time.perf_counter()
    import_libraries()
    seconds = time.perf_counter() - began
    if verbosity > 0:
        echo_note(f"    imported in {seconds:.1f} s")
    return seconds


def verbosity_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options -q and -v, as the argument `verbosity`: -1, 0 or 1."""

    @functools.wraps(function)
    def wrapper(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        if quiet and verbose:
            raise click.UsageError("-q and -v: expected one of them")
        return function(*args, verbosity=verbose - quiet, **kwargs)

    wrapper = click.option("-v", "--verbose", is_flag=True, help="Also print how long each part takes.")(wrapper)
    return click.option("-q", "--quiet", is_flag=True, help="Print no progress, only warnings, errors and results.")(
        wrapper
    )


class UserPath(click.Path):
    """A path in which a leading ~ is the home folder, even where the shell leaves it as it is: `--out=~/runs`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


def echo_note(text: str) -> None:
    """A line on stderr, with nothing in it that could steer a terminal."""
    click.echo(printable(text), err=True)


def echo_json(value: Any) -> None:
    """A value as JSON; ASCII if stdout is not UTF-8."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=not _is_utf()))


def echo_recipe(text: str) -> None:
    """A recipe. Files and pipes get UTF-8, like every recipe, whatever encoding stdout has."""
    if sys.stdout.isatty() or _is_utf():
        click.echo(text, nl=False)
    else:
        click.echo(text.encode(errors="backslashreplace"), nl=False)


def _is_utf() -> bool:
    return (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")
