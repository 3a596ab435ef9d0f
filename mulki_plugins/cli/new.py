"""`mulki new`: files to start from; each of its commands is a module of its own."""

from __future__ import annotations

import click

from mulki_plugins.cli.new_plugin import new_plugin
from mulki_plugins.cli.new_recipe import new_recipe


@click.group()
def new() -> None:
    """Write files to start from; nothing that is there is overwritten."""


for command in (new_recipe, new_plugin):
    new.add_command(command)
