"""`mulki data`: check for a recipe's data sets and download missing ones."""

from __future__ import annotations

from typing import Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import echo_json, echo_note, read_changes, recipe_options, report_errors, resolve_recipe
from mulki_plugins.errors import Mistakes
from mulki_plugins.report.tables import columns


@click.group()
def data() -> None:
    """Check for a recipe's data sets and download missing ones.

    Data of the streams `mtil` and `folders` can be checked, data of `mtil` also downloaded.
    """


@data.command()
@recipe_options
@click.option("--decode", is_flag=True, help="Decode every image instead of reading only both ends of its file.")
@click.option("--json", "as_json", is_flag=True, help="Print {ok, datasets, ...} as JSON.")
@report_errors
def check(recipe: str, decode: bool, as_json: bool, **options: Any) -> None:
    """List the data sets of RECIPE: where each should be, its contents against the expected ones, how to get it.

    For your own `folders`: each task's classes and images, damaged images, and files that are ignored.

    The exit status is 0 if all data sets are complete and as published, and 2 if one is missing, damaged or different.
    Nothing is changed.
    """
    streams = [each for each in _streams(recipe, options) if each["name"] in ("mtil", "folders")]
    if not streams:
        return _nothing_to_do(recipe, as_json)
    from mulki_plugins.streams.report import list_problems
    from mulki_plugins.streams.report import report_folders as check_folders
    from mulki_plugins.streams.report import report_mtil as check_mtil

    reports = []
    for stream in streams:
        if stream["name"] == "folders":
            reports.append(check_folders(stream["tasks"], decode=decode))
            for note in reports[-1]["notes"]:
                echo_note(note)
        else:
            reports.append(check_mtil(stream, decode=decode))
    if as_json:
        ok = all(report["ok"] for report in reports)
        whole = {
            "ok": ok,
            "datasets": [entry for report in reports for entry in report["datasets"]],
            "streams": reports,
        }
        echo_json(reports[0] if len(reports) == 1 else whole)
        if not ok:
            raise SystemExit(2)
        return None
    click.echo("\n\n".join("\n".join(_report_lines(report)) for report in reports))
    if wrong := [problem for report in reports for problem in list_problems(report)]:
        raise Mistakes(wrong)
    return None


@data.command()
@recipe_options
@report_errors
def fetch(recipe: str, **options: Any) -> None:
    """Download the missing data sets of RECIPE to `stream.root`, as far as they can be downloaded.

    Existing files are neither overwritten nor deleted. The exit status is 2 if a data set could not be downloaded.
    """
    streams = [each for each in _streams(recipe, options) if each["name"] == "mtil"]
    if not streams:
        return _nothing_to_do(recipe, as_json=False)
    from mulki_plugins.streams.mtil.fetch import fetch_missing

    if wrong := [problem for stream in streams for problem in fetch_missing(stream, echo_note)]:
        raise Mistakes(wrong)
    return None


def _streams(recipe: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The streams that read the recipe's data, with their options: its own, or those inside `split` and `mixed`, and that of
    the reference data if a plugin needs them."""
    from mulki_plugins.recipe.settings import needs_reference
    from mulki_plugins.streams.nested import innermost

    resolved = resolve_recipe(recipe, read_changes(changes)).recipe
    streams = [resolved.stream, *([resolved.reference] if resolved.reference and needs_reference(resolved) else [])]
    return [each for stream in streams for each in innermost({"name": stream.name, **stream.options})]


def _nothing_to_do(recipe: str, as_json: bool) -> None:
    if as_json:
        echo_json({"ok": True, "datasets": []})
    else:
        scope = "only the streams `mtil` and `folders` have data to check, only `mtil` has data to download"
        click.echo(printable(f"{recipe}: nothing to do: {scope}"))


def _report_lines(report: dict[str, Any]) -> list[str]:
    """A line for each data set, and instructions for missing ones."""
    datasets, published = report["datasets"], "root" in report
    rows = [["data set" if published else "task", "state", "classes", "train", "test", "folder"]]
    for dataset in datasets:
        counts = [dataset["classes"], *(dataset["images"][part] for part in ("train", "test"))]
        rows.append([dataset["name"], dataset["state"], *map(_count, counts), dataset["folder"]])
    lines = columns(rows, "<<>>><")
    if published:
        lines = [printable(f"root {report['root']}, split {report['split']}; counts are found / expected"), "", *lines]
    if missing := [dataset for dataset in datasets if dataset["state"] == "missing"]:
        lines += ["", "to get the missing data sets:"]
        for dataset in missing:
            lines += [printable(line) for line in f"  {dataset['name']}: {dataset['get']}".splitlines()]
    return lines


def _count(numbers: dict[str, int | None]) -> str:
    found, expected = ("-" if number is None else f"{number:,}" for number in (numbers["found"], numbers["expected"]))
    return found if numbers["expected"] is None else f"{found} / {expected}"
