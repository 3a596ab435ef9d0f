"""Commands by name, each imported when it is called: those that other packages register, and the members of a group."""

from __future__ import annotations

from typing import Any

import click

from mulki_plugins.cli.common import reports_mistakes
from mulki_plugins.cli.output import surviving_output
from mulki_plugins.registry.parts import Part


class Later(click.Command):
    """A command of which only name and summary are known until it is called."""

    def __init__(self, part: Part) -> None:
        super().__init__(part.name, help=part.summary, short_help=part.summary)
        self.part = part

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        command = reports_mistakes(self._loaded)()
        context: click.Context = command.make_context(info_name, args, parent=parent, **extra)
        return context

    def _loaded(self) -> click.Command:
        from mulki_plugins.errors import MulkiError

        command: Any = self.part.load()
        if not isinstance(command, click.Command):
            what = f"expected a click.Command, got a {type(command).__name__}"
            raise MulkiError(f"the command {self.name!r} of {self.part.provenance}: {self.part.target}: {what}")
        return command


class CommandsByName(click.Group):
    """MulKI's own commands, and those that other packages register."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with surviving_output():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Whatever a command raises is reported on one line, whoever wrote it."""
        return reports_mistakes(super().invoke)(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(part.name for part in _theirs())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        return own or next((Later(part) for part in _theirs() if part.name == cmd_name), None)


def _theirs() -> list[Part]:
    from mulki_plugins.registry.discovery import catalog

    return [part for part in catalog().of_kind("command") if part.provenance.distribution != "mulki"]


@reports_mistakes
def switch_off(ctx: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> None:
    """The callback of `--no-plugin`: before anything else asks which packages there are."""
    from mulki_plugins.registry.discovery import leave_alone

    leave_alone(names)
