"""Commands by name, each imported when it is called: those that other packages register, and the members of a group."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.cli.common import reports_mistakes, traceback_kept
from mulki_plugins.cli.output import surviving_output
from mulki_plugins.cli.stdout import given_to_command, kept_for_results
from mulki_plugins.registry.catalog import Part

_CLICKS = (click.ClickException, click.Abort, click.exceptions.Exit)


class Later(click.Command):
    """A command of which only name and summary are known until it is called."""

    def __init__(self, part: Part) -> None:
        super().__init__(part.name, help=part.summary, short_help=part.summary)
        self.part = part

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        command = copy.copy(reports_mistakes(self._loaded)())
        command.invoke = reports_mistakes(self._guarded(command.invoke))  # type: ignore[method-assign]
        make_context = reports_mistakes(self._guarded(command.make_context))
        context: click.Context = make_context(info_name, args, parent=parent, **extra)
        return context

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The command's own exit status, usage errors and Ctrl-C count; whatever else it raises is a MulkiError."""

        def call(*args: Any, **kwargs: Any) -> Any:
            from mulki_plugins.errors import MulkiError
            from mulki_plugins.registry.guard import cause_of

            try:
                with given_to_command():
                    return function(*args, **kwargs)
            except (MulkiError, SystemExit, KeyboardInterrupt, EOFError, *_CLICKS):
                raise
            except BaseException as error:
                said = f"the {self.part} failed: {cause_of(error, self.part.package)}"
                raise MulkiError(said, traceback_kept(error)) from error

        return call

    def _loaded(self) -> click.Command:
        from mulki_plugins.errors import MulkiError

        command: Any = self.part.load()
        if not isinstance(command, click.Command):
            what = f"expected a click.Command, got a {type(command).__name__}"
            raise MulkiError(f"the command {self.name!r} of {self.part.provenance}: {self.part.target}: {what}")
        return command


class CommandsByName(click.Group):
    """MulKI's own commands, and those that other packages register."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The program itself, as opposed to a call by another one."""
        with kept_for_results():
            return self.main(*args, **kwargs)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with surviving_output():
            try:
                return super().main(*args, **kwargs)
            finally:
                _name_slow_packages()

    def invoke(self, ctx: click.Context) -> Any:
        """Whatever a command raises is reported on one line, whoever wrote it."""
        return reports_mistakes(super().invoke)(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(part.name for part in _theirs())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        return own or next((Later(part) for part in _theirs() if part.name == cmd_name), None)


def _name_slow_packages() -> None:
    """Warn of packages that make every command wait, if this one has loaded them."""
    from mulki_plugins.registry.discovery import catalog

    if catalog.cache_info().currsize:
        for package in catalog().packages:
            if package.slow:
                name = package.provenance.distribution
                hint = f"leave it out with `mulki --no-plugin {name} ...`"
                with contextlib.suppress(OSError):  # of a closed stderr
                    click.echo(printable(f"warning: {package.provenance} {package.slow}; {hint}"), err=True)


def _theirs() -> list[Part]:
    from mulki_plugins.registry.discovery import catalog

    return [part for part in catalog().of_kind("command") if part.provenance.distribution != "mulki"]


@reports_mistakes
def switch_off(ctx: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> None:
    """The callback of `--no-plugin`: before anything else asks which packages there are."""
    from mulki_plugins.registry.discovery import ignore_packages

    ignore_packages(names)
