"""`mulki report`: the evidence of runs as one page, and as tables for a paper."""

from __future__ import annotations

from pathlib import Path

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import UserPath, echo_note, report_errors


@click.command()
@click.argument("folders", nargs=-1, required=True, type=UserPath(path_type=Path), metavar="DIR...")
@click.option(
    "--out", type=UserPath(dir_okay=False, path_type=Path), default=Path("report.html"), show_default=True,
    help="The page to write.",
)  # fmt: skip
@click.option(
    "--latex", type=UserPath(dir_okay=False, path_type=Path), help="Also write the tables in LaTeX, for booktabs."
)
@click.option("--csv", "csv_file", type=UserPath(dir_okay=False, path_type=Path), help="Also write the tables as CSV.")
@click.option("--title", default="Report", show_default=True, help="The page's title.")
@click.option(
    "--resamples", type=click.IntRange(min=100, max=1_000_000), default=10_000, show_default=True,
    help="Resamples of the bootstrap: fewer are faster, more give finer p-values.",
)  # fmt: skip
@report_errors
def report(
    folders: tuple[Path, ...], out: Path, latex: Path | None, csv_file: Path | None, title: str, resamples: int
) -> None:
    """Write a page that compares runs: matrices, curves, tests between strategies, losses, cost and recipes.

    The page is one file without any address outside it: send it, print it, read it on a phone. DIR is a run's folder,
    or any folder above several runs, such as `runs` or `runs/mtil`.
    """
    from mulki_plugins.libraries import import_library

    import_library("matplotlib")  # in a clean environment
    from mulki_plugins.report.page.save import check_targets, save
    from mulki_plugins.report.result import find_results

    targets = check_targets({"--out": out, "--latex": latex, "--csv": csv_file})
    runs, errors = find_results(folders)  # before what takes seconds to import
    from mulki_plugins.report.page.experiment import experiments
    from mulki_plugins.report.page.paper import latex_tables, table_rows, write_csv
    from mulki_plugins.report.page.render import render_page

    for line in errors:
        echo_note(f"warning: left out: {line}")
    echo_note(f"comparing {len(runs)} run{'' if len(runs) == 1 else 's'}")
    compared = experiments(runs, resamples)
    texts = {"--out": render_page(runs, compared, resamples, title)}
    if latex:
        texts["--latex"] = latex_tables(compared)
    if csv_file:
        texts["--csv"] = write_csv(table_rows(compared))
    for option, path in targets.items():
        save(path, texts[option])
        click.echo(printable(str(path)))
