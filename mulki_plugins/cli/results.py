"""`mulki results`: the tables of finished runs, from their files."""

from __future__ import annotations

from pathlib import Path

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import echo_json, reports_mistakes
from mulki_plugins.errors import MulkiError

NAMED = 5
"""So many of the folders that are left out are named."""


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option(
    "--against",
    type=click.Choice(["published"]),
    help="Put the runs beside the published tables of MTIL, with what keeps them from being compared.",
)
@click.option(
    "--order", type=click.Choice(["I", "II"]), help="With --against: the tables of this order, not of the run's."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print {runs, summary}, or with --against {comparisons, ...}, as JSON."
)
@reports_mistakes
def results(folders: tuple[Path, ...], against: str | None, order: str | None, as_json: bool) -> None:
    """Print the results of the runs in DIR..., and compare them: mean ± standard deviation over seeds.

    DIR is a run's folder, or any folder above several of them, such as `runs` or `runs/mtil/mulki`.
    """
    from mulki_plugins.report.beside import beside_data
    from mulki_plugins.report.beside_table import beside_text
    from mulki_plugins.report.compare import comparison_data, comparison_text
    from mulki_plugins.report.result import find_results, moved_aside

    if order and not against:
        raise MulkiError("--order goes with --against", "type: mulki results DIR --against published --order II")
    found, wrong = find_results(folders)
    for line in wrong:
        click.echo(printable(f"warning: left out: {line}"), err=True)
    if aside := moved_aside(folders):
        names = ", ".join(map(str, aside[:NAMED])) + (f" and {len(aside) - NAMED} more" if len(aside) > NAMED else "")
        what = "runs that later ones took the place of; name their folders to see them"
        click.echo(printable(f"note: left out: {names}: {what}"), err=True)
    if against and as_json:
        echo_json(beside_data(found, order))
    elif against:
        click.echo(beside_text(found, order))
    elif as_json:
        echo_json(comparison_data(found))
    else:
        click.echo(comparison_text(found))
