"""`mulki data`: whether the data sets of a recipe are on disk, and getting those that are not."""

from __future__ import annotations

from typing import Any

import click

from mulki_plugins.cli.common import changes_from, echo_json, recipe_options, reports_mistakes, resolved
from mulki_plugins.errors import Mistakes, plain

STREAM = "mtil"
"""The stream whose data sets lie on the user's disk."""


@click.group()
def data() -> None:
    """Check and fetch the data sets of a recipe whose stream is `mtil`."""


@data.command()
@recipe_options
@click.option("--decode", is_flag=True, help="Decode every image, not only look at both ends of its file.")
@click.option("--json", "as_json", is_flag=True, help="Print {root, split, ok, datasets} as JSON.")
@reports_mistakes
def check(recipe: str, decode: bool, as_json: bool, **options: Any) -> None:
    """List the data sets of RECIPE: where each was looked for, what is there and what was expected, how to get it.

    The exit status is 0 where all are there as published, and 2 where one is missing, damaged or differs. Nothing is changed.
    """
    said = _options(recipe, options)
    if said is None:
        return _nothing_to_do(recipe, as_json)
    from mulki_plugins.streams.mtil.report import checked, problems, report_text

    report = checked(said, decode=decode)
    if as_json:
        echo_json(report)
        if not report["ok"]:
            raise SystemExit(2)
        return None
    click.echo(plain_lines(report_text(report)))
    if wrong := problems(report):
        raise Mistakes(wrong)
    return None


@data.command()
@recipe_options
@reports_mistakes
def fetch(recipe: str, **options: Any) -> None:
    """Download the data sets of RECIPE that are missing and that can be downloaded, to `stream.root`.

    Nothing that is there is overwritten or deleted. The exit status is 2 where one could not be got.
    """
    said = _options(recipe, options)
    if said is None:
        return _nothing_to_do(recipe, False)
    from mulki_plugins.streams.mtil.fetch import fetch_missing

    wrong = fetch_missing(said, lambda text: click.echo(plain(text), err=True))
    if wrong:
        raise Mistakes(wrong)
    return None


def plain_lines(text: str) -> str:
    return "\n".join(plain(line) for line in text.splitlines())


def _options(recipe: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The options of the recipe's stream; None where it is another stream."""
    stream = resolved(recipe, changes_from(options)).recipe.stream
    return stream.options if stream.name == STREAM else None


def _nothing_to_do(recipe: str, as_json: bool) -> None:
    if as_json:
        echo_json({"ok": True, "datasets": []})
    else:
        click.echo(
            plain(
                f"{recipe}: its stream is not `{STREAM}`, the one whose data sets are downloaded: there is nothing to do"
            )
        )
