"""`mulki plugins`: the packages that add to MulKI, what each brings, and why one cannot be used."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import click

from mulki_plugins.characters import pad, printable, width
from mulki_plugins.cli.common import echo_json, reports_mistakes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a list with a mapping for each as JSON.")
@reports_mistakes
def plugins(as_json: bool) -> None:
    """List the packages that add parts to MulKI, all their parts, and the state of each.

    A state is `ok`, `switched off` (by --no-plugin or MULKI_PLUGINS), `left out` (the package failed, or the part needs one
    that is not there: nothing of it is used) or `broken` (it is listed, but a recipe with it would be refused).
    """
    from mulki_plugins.cli.inventory import inventory, loose_ends

    rows = inventory()
    if as_json:
        echo_json(rows)
        return
    for (distribution, version), group in groupby(rows, key=lambda row: (row["distribution"], row["version"])):
        click.echo(printable(f"{distribution} {version}".rstrip() + ":"))
        _table(list(group))
        click.echo()
    for line in loose_ends():
        click.echo(printable(f"warning: {line}"), err=True)


def _table(rows: list[dict[str, Any]]) -> None:
    names, kinds = (max(width(row[key]) for row in rows) for key in ("name", "kind"))
    for row in rows:
        state = row["state"] + (f": {row['cause']}" if row["cause"] else "")
        summary = f"  {row['summary']}" if row["summary"] else ""
        click.echo(printable(f"  {row['kind']:<{kinds}}  {pad(row['name'], names)}  {state}{summary}"))
        for note in row["notes"]:
            click.echo(printable(f"  {'':<{kinds}}  {'':<{names}}  note: {note}"))
