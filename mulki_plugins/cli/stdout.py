"""Keeps stdout for results: whatever other code writes to file descriptor 1 goes to stderr while a command runs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from mulki_plugins.cli.output import open_descriptors, surviving_writer


class Results(io.TextIOWrapper):
    """The true stdout, for the main thread. What another thread prints goes to stderr."""

    def write(self, text: str) -> int:
        if threading.current_thread() is not threading.main_thread():
            return sys.stderr.write(text) if sys.stderr is not None else len(text)
        return super().write(text)


@contextlib.contextmanager
def kept_for_results() -> Iterator[None]:
    """Within it `sys.stdout` alone leads to stdout; after it, nothing does: what is printed while Python ends is no result.

    Nothing is changed where `sys.stdout` is closed, or has been replaced by the program that calls the command.
    """
    open_descriptors()
    if sys.stdout is None or sys.stdout is not sys.__stdout__ or not _is_descriptor_1(sys.stdout):
        yield
        return
    before: Any = sys.stdout
    with contextlib.suppress(OSError):
        before.flush()
    results = Results(
        surviving_writer(io.FileIO(os.dup(1), "w")), encoding=before.encoding, errors="backslashreplace",
        line_buffering=True, write_through=before.write_through,
    )  # fmt: skip
    _point_at_stderr()
    sys.stdout = results
    try:
        yield
    finally:
        sys.stdout = sys.stderr
        results.flush()


@contextlib.contextmanager
def given_to_command() -> Iterator[None]:
    """Within it, descriptor 1 is the true stdout again: for another package's command, whose child processes print there."""
    if not isinstance(results := sys.stdout, Results):
        yield
        return
    results.flush()
    os.dup2(results.fileno(), 1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.__stdout__.flush()  # type: ignore[union-attr]
        _point_at_stderr()


def _is_descriptor_1(stream: Any) -> bool:
    try:
        return bool(stream.fileno() == 1)
    except (OSError, ValueError):
        return False


def _point_at_stderr() -> None:
    try:
        os.dup2(2, 1)
    except OSError:  # stderr is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
