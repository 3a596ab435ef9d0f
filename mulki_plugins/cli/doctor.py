"""`mulki doctor`: whether everything that MulKI needs is there and works."""

from __future__ import annotations

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import echo_json, reports_mistakes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print {ok, checks: [{name, state, found, hint}]} as JSON.")
@reports_mistakes
def doctor(as_json: bool) -> None:
    """Look whether everything works: Python, torch, devices, Avalanche, open_clip, plugins, data, disk.

    The exit status is 0 where nothing is wrong, else 1. A warning, such as a package that is left out, counts as wrong.
    """
    from mulki_plugins.cli.health import examine

    checks = examine()
    well = all(check["state"] == "ok" for check in checks)
    if as_json:
        echo_json({"ok": well, "checks": checks})
    else:
        width = max(len(check["name"]) for check in checks)
        for check in checks:
            hint = f"; {check['hint']}" if check["hint"] else ""
            click.echo(printable(f"{check['state']:<7}  {check['name']:<{width}}  {check['found']}{hint}"))
    if not well:
        raise SystemExit(1)
