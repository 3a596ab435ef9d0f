"""`mulki data`: whether the data sets of a recipe are on disk, and getting those that are not."""

from __future__ import annotations

from typing import Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import changes_from, echo_json, recipe_options, reports_mistakes, resolved
from mulki_plugins.errors import Mistakes

STREAM = "mtil"
"""The stream whose data sets can be downloaded."""
OWN = "folders"
"""The stream of the user's own images."""


@click.group()
def data() -> None:
    """Check the data of a recipe whose stream is `mtil` or `folders`; fetch those of `mtil`."""


@data.command()
@recipe_options
@click.option("--decode", is_flag=True, help="Decode every image, not only look at both ends of its file.")
@click.option("--json", "as_json", is_flag=True, help="Print {ok, datasets, ...} as JSON.")
@reports_mistakes
def check(recipe: str, decode: bool, as_json: bool, **options: Any) -> None:
    """List the data sets of RECIPE: where each was looked for, what is there and what was expected, how to get it.

    Of your own `folders`: each task's classes and images, which images are damaged, and what is passed over.

    The exit status is 0 where all are there as published, and 2 where one is missing, damaged or differs. Nothing is changed.
    """
    stream = resolved(recipe, changes_from(options)).recipe.stream
    if stream.name not in (STREAM, OWN):
        return _nothing_to_do(recipe, as_json)
    from mulki_plugins.streams.report import format_report, list_problems, report_mtil

    if stream.name == OWN:
        from mulki_plugins.streams.report import report_folders as checked_folders

        report = checked_folders(stream.options["tasks"], decode=decode)
        for note in report["notes"]:
            click.echo(printable(note), err=True)
    else:
        report = report_mtil(stream.options, decode=decode)
    if as_json:
        echo_json(report)
        if not report["ok"]:
            raise SystemExit(2)
        return None
    click.echo(plain_lines(format_report(report)))
    if wrong := list_problems(report):
        raise Mistakes(wrong)
    return None


@data.command()
@recipe_options
@reports_mistakes
def fetch(recipe: str, **options: Any) -> None:
    """Download the data sets of RECIPE that are missing and that can be downloaded, to `stream.root`.

    Nothing that is there is overwritten or deleted. The exit status is 2 where one could not be got.
    """
    stream = resolved(recipe, changes_from(options)).recipe.stream
    if stream.name != STREAM:
        return _nothing_to_do(recipe, False)
    from mulki_plugins.streams.mtil.fetch import fetch_missing

    wrong = fetch_missing(stream.options, lambda text: click.echo(printable(text), err=True))
    if wrong:
        raise Mistakes(wrong)
    return None


def plain_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.splitlines())


def _nothing_to_do(recipe: str, as_json: bool) -> None:
    if as_json:
        echo_json({"ok": True, "datasets": []})
    else:
        click.echo(
            printable(
                f"{recipe}: data are checked for the streams `{STREAM}` and `{OWN}`, and downloaded for `{STREAM}`: "
                "there is nothing to do"
            )
        )
