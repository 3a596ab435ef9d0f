"""What the commands share: the arguments that name and change a recipe, and how mistakes are reported."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mulki_plugins.errors import MulkiError, plain

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
        click.option("--strategy", metavar="NAME", help="Use this strategy in place of the recipe's."),
        click.argument("recipe"),
    ):  # fmt: skip
        function = decorate(function)
    return function


def changes_from(options: dict[str, Any]) -> Changes:
    """The command line's changes; takes their options out of `options`."""
    from mulki_plugins.recipe.resolve import Changes

    names = ("strategy", "with_plugins", "without_plugins", "settings", "seeds")
    return Changes(**{name: options.pop(name) for name in names})


def resolved(recipe: str, changes: Changes) -> Resolved:
    """The checked recipe, after its notices have been printed."""
    from mulki_plugins.recipe.resolve import resolve

    result = resolve(recipe, changes)
    for notice in result.notices:
        click.echo(plain(notice), err=True)
    return result


def echo_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
