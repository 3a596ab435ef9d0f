"""`--watch`: prints a command's output again whenever it changes, with the latest line of each run in progress."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError
from mulki_plugins.files import is_locked
from mulki_plugins.report.run_log import FILE as LOG

SECONDS = 2.0
"""Between two looks."""
TAIL = 4096
"""Bytes from the end of a log in which its last line is."""


def watch_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --watch to a command with the argument `folders`, which prints to stdout."""

    @functools.wraps(function)
    def wrapper(*args: Any, watch: bool, **kwargs: Any) -> None:
        if watch and (kwargs.get("as_json") or kwargs.get("form", "text") != "text"):
            raise MulkiError("--watch prints text only", "leave out --json and --format")
        if watch:
            watch_output(lambda: function(*args, **kwargs), kwargs["folders"])
        else:
            function(*args, **kwargs)

    return click.option("--watch", is_flag=True, help="Print again whenever a run has got further; Ctrl-C ends it.")(
        wrapper
    )


def watch_output(
    command: Callable[[], Any], folders: Iterable[Path], *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Call the command again and again, and print its output with the runs in progress if either has changed.

    Ends with Ctrl-C. A command that finds nothing yet is tried again.
    """
    shown = ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            text = _output_of(command)
            if running := list(progress_of(folders)):
                text += "\n" + "\n".join(running) + "\n"
            if text != shown:
                if sys.stdout.isatty():
                    click.clear()
                click.echo(text, nl=False)
                shown = text
            sleep(SECONDS)


def progress_of(folders: Iterable[Path]) -> Iterator[str]:
    """The last line in the log of each run below the folders that a process is writing now."""
    for folder in folders:
        for log in sorted(folder.rglob(LOG)) if folder.is_dir() else ():
            if is_locked(log.parent):
                with contextlib.suppress(OSError), log.open("rb") as file:
                    file.seek(max(0, log.stat().st_size - TAIL))
                    lines = file.read().decode("utf-8", "replace").rstrip("\n").split("\n")
                    yield printable(f"{log.parent}: {lines[-1]}")


def _output_of(command: Callable[[], Any]) -> str:
    """What the command prints to stdout, or its error."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            command()
    except MulkiError as error:
        return "".join(f"{printable(line)}\n" for line in error.lines())
    return output.getvalue()
