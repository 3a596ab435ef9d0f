"""`mulki results`: print the tables of finished runs."""

from __future__ import annotations

from pathlib import Path

import click

from mulki_plugins.cli.common import echo_json, echo_note, report_errors
from mulki_plugins.cli.watch import watch_option
from mulki_plugins.errors import MulkiError

NAMED = 5
"""Skipped folders that are named at most."""


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option(
    "--against",
    type=click.Choice(["published"]),
    help="Show the runs beside the published tables of MTIL, and warn of what makes them incomparable.",
)
@click.option(
    "--order", type=click.Choice(["I", "II"]), help="With --against: show the tables of this order, not of the run's."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print {runs, summary}, or with --against {comparisons, ...}, as JSON."
)
@report_errors
@watch_option
def results(folders: tuple[Path, ...], against: str | None, order: str | None, as_json: bool) -> None:
    """Print and compare the results of runs.

    Several runs are compared by mean ± standard deviation over seeds. DIR is a run's folder, or any folder above
    several runs, such as `runs` or `runs/mtil/mulki`.
    """
    from mulki_plugins.report.compare import comparison_data
    from mulki_plugins.report.published import published_data
    from mulki_plugins.report.result import find_results, runs_moved_aside
    from mulki_plugins.report.tables import comparison_text, published_text

    if order and not against:
        raise MulkiError("--order needs --against", "type: mulki results DIR --against published --order II")
    runs, errors = find_results(folders)
    for line in errors:
        echo_note(f"warning: left out: {line}")
    if aside := runs_moved_aside(folders):
        names = ", ".join(map(str, aside[:NAMED])) + (f" and {len(aside) - NAMED} more" if len(aside) > NAMED else "")
        echo_note(f"note: left out: {names}: later runs replaced them; name their folders to see them")
    if against and as_json:
        echo_json(published_data(runs, order))
    elif against:
        click.echo(published_text(runs, order))
    elif as_json:
        echo_json(comparison_data(runs))
    else:
        click.echo(comparison_text(runs))
