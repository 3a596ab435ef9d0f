"""`mulki new`: files to start from; each of its commands is a module of its own."""

from __future__ import annotations

import click

from mulki_plugins.cli.new_plugin import new_plugin


@click.group()
def new() -> None:
    """Write files to start from."""


new.add_command(new_plugin)
