"""The group of commands: MulKI's own, and those of other packages, which are imported when they are called."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import click

from mulki_plugins.cli.common import echo_note, report_errors, save_traceback
from mulki_plugins.cli.output import protected_output, stdout_for_command, stdout_for_results
from mulki_plugins.errors import MulkiError
from mulki_plugins.registry.catalog import OURS, Part
from mulki_plugins.registry.discovery import catalog, ignore_packages
from mulki_plugins.registry.guard import cause_of

_CLICK_ERRORS = (click.ClickException, click.Abort, click.exceptions.Exit)


class LazyCommand(click.Command):
    """Another package's command. Only its name and summary are known until it is called."""

    def __init__(self, part: Part) -> None:
        super().__init__(part.name, help=part.summary, short_help=part.summary)
        self.part = part

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        command: Any = copy.copy(report_errors(self._load)())
        command.invoke = report_errors(self._guarded(command.invoke))
        make_context = report_errors(self._guarded(command.make_context))
        context: click.Context = make_context(info_name, args, parent=parent, **extra)
        return context

    def _load(self) -> click.Command:
        command: Any = self.part.load()
        if not isinstance(command, click.Command):
            problem = f"expected a click.Command, got a {type(command).__name__}"
            raise MulkiError(f"the command {self.name!r} of {self.part.provenance}: {self.part.target}: {problem}")
        return command

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Let exit statuses, usage errors and Ctrl-C through; turn any other exception into a MulkiError."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                with stdout_for_command():
                    return function(*args, **kwargs)
            except (MulkiError, SystemExit, KeyboardInterrupt, EOFError, *_CLICK_ERRORS):
                raise
            except BaseException as error:
                message = f"the {self.part} failed: {cause_of(error, self.part.package)}"
                raise MulkiError(message, save_traceback(error)) from error

        return call


class Commands(click.Group):
    """MulKI's commands and those of other packages."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The `mulki` program; `main` is for programs that call a command."""
        with stdout_for_results():
            return self.main(*args, **kwargs)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with protected_output():
            try:
                return super().main(*args, **kwargs)
            finally:
                _warn_of_slow_packages()

    def invoke(self, ctx: click.Context) -> Any:
        return report_errors(super().invoke)(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(part.name for part in _foreign_commands())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        return command or next((LazyCommand(part) for part in _foreign_commands() if part.name == cmd_name), None)


def _warn_of_slow_packages() -> None:
    """Warn of packages that slow down every command, if this command has loaded them."""
    if catalog.cache_info().currsize:
        for package in catalog().packages:
            if package.slow:
                hint = f"leave it out with `mulki --no-plugin {package.provenance.distribution} ...`"
                with contextlib.suppress(OSError):  # stderr is closed
                    echo_note(f"warning: {package.provenance} {package.slow}; {hint}")


def _foreign_commands() -> list[Part]:
    return [part for part in catalog().of_kind("command") if part.provenance.distribution != OURS]


@report_errors
def switch_off(ctx: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> None:
    """The eager callback of `--no-plugin`: it runs before packages are loaded."""
    ignore_packages(names)
