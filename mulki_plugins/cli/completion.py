"""`mulki completion`: print the line that switches on completion in a shell."""

from __future__ import annotations

import click

LINES = {
    "bash": ('eval "$(_MULKI_COMPLETE=bash_source mulki)"', "~/.bashrc"),
    "zsh": ('eval "$(_MULKI_COMPLETE=zsh_source mulki)"', "~/.zshrc"),
    "fish": ("_MULKI_COMPLETE=fish_source mulki | source", "~/.config/fish/completions/mulki.fish"),
}
"""Of each shell: the line, and the file that it belongs in."""


@click.command()
@click.argument("shell", type=click.Choice(tuple(LINES)))
def completion(shell: str) -> None:
    """Print the line that makes SHELL complete commands, recipes, strategies, plugins and the keys after --set.

    Add it to the shell's start-up file: `mulki completion bash >> ~/.bashrc`, `mulki completion zsh >> ~/.zshrc`, or
    `mulki completion fish > ~/.config/fish/completions/mulki.fish`. It needs bash 4.4 or newer.
    """
    line, file = LINES[shell]
    click.echo(line)
    click.echo(f"add this line to {file} and open a new shell", err=True)
