"""What the commands share: the arguments that name and change a recipe, and how mistakes are reported."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.errors import Mistakes, MulkiError, plain

if TYPE_CHECKING:
    from mulki_plugins.recipe.resolve import Changes, Resolved


PRINTED = 100
"""How many mistakes are printed."""


def reports_mistakes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A user's mistake is printed, one line each, and ends with status 2; a closed pipe ends quietly, a full disk does not."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MulkiError as error:
            lines = error.lines()
            for line in lines[:PRINTED]:
                click.echo(f"error: {plain(line)}", err=True)
            if len(lines) > PRINTED:
                click.echo(f"error: and {len(lines) - PRINTED} more", err=True)
            raise SystemExit(error.status) from None
        except BrokenPipeError:
            _silence_stdout()
            raise SystemExit(0) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _silence_stdout()
            click.echo(f"error: {error.strerror}; what was written before is still there", err=True)
            raise SystemExit(2) from None

    return wrapper


def _silence_stdout() -> None:
    """So that the interpreter does not stumble over it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def resolved(recipe: str, changes: Changes) -> Resolved:
    """The checked recipe, after its notices have been printed."""
    return all_resolved(recipe, [changes])[0]


def all_resolved(recipe: str, variants: Sequence[Changes]) -> list[Resolved]:
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
        click.echo(plain(notice), err=True)
    return results


def echo_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
