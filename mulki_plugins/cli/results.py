"""`mulki results`: the tables of finished runs, from their files."""

from __future__ import annotations

from pathlib import Path

import click

from mulki_plugins.cli.common import echo_json, reports_mistakes
from mulki_plugins.errors import plain


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option("--json", "as_json", is_flag=True, help="Print {runs, summary} as JSON.")
@reports_mistakes
def results(folders: tuple[Path, ...], as_json: bool) -> None:
    """Print the results of the runs in DIR..., and compare them: mean ± standard deviation over seeds.

    DIR is a run's folder, or any folder above several of them, such as `runs` or `runs/mtil/mulki`.
    """
    from mulki_plugins.report.compare import comparison_data, comparison_text
    from mulki_plugins.report.result import find_results

    found, wrong = find_results(folders)
    for line in wrong:
        click.echo(plain(f"warning: left out: {line}"), err=True)
    if as_json:
        echo_json(comparison_data(found))
    else:
        click.echo(comparison_text(found))
