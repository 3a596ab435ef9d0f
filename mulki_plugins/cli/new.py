"""`mulki new`: files to start from."""

from __future__ import annotations

import click

from mulki_plugins.cli.new_recipe import new_recipe


@click.group()
def new() -> None:
    """Write a file to start from; nothing that is there is overwritten."""


for command in (new_recipe,):
    new.add_command(command)
