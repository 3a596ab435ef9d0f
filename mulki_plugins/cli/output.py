"""Standard output and standard error: only results reach stdout, and no failed write ends a command."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

_NO_READER = (errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ESHUTDOWN, errno.ENXIO)
"""Errors of a pipe, a socket or a closed descriptor that nobody reads from."""


class _Protected(io.RawIOBase):
    """Writes to a descriptor; keeps the first error instead of raising it."""

    def __init__(self, raw: Any) -> None:
        super().__init__()
        self._raw = raw
        self._terminal = raw.isatty()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := self._raw.write(data)) is None:  # a full non-blocking pipe
                select.select([], [self._raw], [])
            return int(written)
        except OSError as error:
            self.error = self.error or error
        return len(data)

    @property
    def has_no_reader(self) -> bool:
        """Whether the error only means that nobody reads: the pipe's reader has ended, or the terminal is closed."""
        number = self.error.errno if self.error else None
        return number in _NO_READER or (number == errno.EIO and self._terminal)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())


@contextlib.contextmanager
def protected_output() -> Iterator[None]:
    """Run a command whose writes to stdout and stderr never fail, even if these are closed, full or not UTF-8.

    If stdout could not be written the exit status is 2, unless nobody reads it. Errors of stderr do not count. Streams
    that the caller has replaced, such as a test's, are left alone.
    """
    open_descriptors()
    sys.stderr = protect(sys.stderr, sys.__stderr__, 2)
    sys.stdout = protect(sys.stdout, sys.__stdout__, 1)
    try:
        yield
    except SystemExit as end:
        if end.code in (0, None) and (problem := _stdout_problem()):
            sys.stderr.write(f"error: cannot write to standard output: {problem}\n")
            raise SystemExit(2) from None
        raise


def protect(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    """The process's own stream with writes that never fail; it escapes characters that its encoding lacks."""
    if stream is None:  # the descriptor was closed when the process started
        return _wrap(io.FileIO(descriptor, "w", closefd=False), "utf-8")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if stream is not original or raw is None or isinstance(raw, _Protected):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return _wrap(raw, stream.encoding, bool(getattr(stream, "write_through", False)))


def _wrap(
    raw: Any, encoding: str, write_through: bool = False, kind: type[io.TextIOWrapper] = io.TextIOWrapper
) -> TextIO:
    buffer = io.BufferedWriter(_Protected(raw))
    return kind(buffer, encoding, "backslashreplace", line_buffering=True, write_through=write_through)


def _stdout_problem() -> str:
    """Why stdout could not be written; empty if it could be, or if nobody reads it."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Protected) or raw.error is None or raw.has_no_reader:
        return ""
    return raw.error.strerror or str(raw.error)


def open_descriptors() -> None:
    """Point closed descriptors 0 to 2 at the null device, so that no other file gets their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


class Results(io.TextIOWrapper):
    """The real stdout, for the main thread. Other threads print to stderr."""

    def write(self, text: str) -> int:
        if threading.current_thread() is not threading.main_thread():
            return sys.stderr.write(text) if sys.stderr is not None else len(text)
        return super().write(text)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Reserve stdout for `sys.stdout`; whatever other code writes to descriptor 1 goes to stderr, also after the block.

    Does nothing if `sys.stdout` is closed or was replaced by the caller.
    """
    open_descriptors()
    original: Any = sys.__stdout__
    if original is None or sys.stdout is not original or not _is_descriptor_1(original):
        yield
        return
    with contextlib.suppress(OSError):
        original.flush()
    results = _wrap(
        io.FileIO(os.dup(1), "w"), original.encoding, bool(getattr(original, "write_through", False)), Results
    )
    _redirect_to_stderr()
    sys.stdout = results
    try:
        yield
    finally:
        sys.stdout = sys.stderr  # output during Python's shutdown is no result
        results.flush()


@contextlib.contextmanager
def stdout_for_command() -> Iterator[None]:
    """Restore descriptor 1 for another package's command, whose child processes print there."""
    if not isinstance(results := sys.stdout, Results):
        yield
        return
    results.flush()
    os.dup2(results.fileno(), 1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if sys.__stdout__ is not None:
                sys.__stdout__.flush()
        _redirect_to_stderr()


def _is_descriptor_1(stream: Any) -> bool:
    try:
        return bool(stream.fileno() == 1)
    except (OSError, ValueError):
        return False


def _redirect_to_stderr() -> None:
    try:
        os.dup2(2, 1)
    except OSError:  # stderr is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
