"""Standard output and standard error that end no command: what they cannot take is dropped, and at most the status says so."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_READER_LEFT = (errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ESHUTDOWN, errno.ENXIO)
"""What a pipe, a socket or a closed descriptor answers when nobody reads from it."""


class _Surviving(io.RawIOBase):
    """Writes to a descriptor as far as it can; an error is kept, not raised."""

    def __init__(self, raw: Any) -> None:
        super().__init__()
        self._raw = raw
        self._terminal = raw.isatty()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := self._raw.write(data)) is None:  # a pipe that does not wait, and is full
                select.select([], [self._raw], [])
            return int(written)
        except OSError as error:
            self.error = self.error or error
        return len(data)

    @property
    def reader_left(self) -> bool:
        """Whether the error only means that nobody reads: a pipe's reader has ended, or the terminal is closed."""
        number = self.error.errno if self.error else None
        return number in _READER_LEFT or (number == errno.EIO and self._terminal)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())


@contextmanager
def surviving_output() -> Iterator[None]:
    """For a whole command: no write to stdout or stderr fails, whether they are closed, full or of a narrow encoding.

    Where stdout could not be written the exit status is 2, unless nobody was there to read: then the work that was done
    decides. stderr decides nothing. Streams that are not the process's own, such as a test's, are left as they are.
    """
    open_descriptors()
    sys.stderr = surviving(sys.stderr, sys.__stderr__, 2)
    sys.stdout = surviving(sys.stdout, sys.__stdout__, 1)
    try:
        yield
    except SystemExit as end:
        if end.code in (0, None) and (problem := stdout_problem()):
            sys.stderr.write(f"error: standard output cannot be written: {problem}\n")
            raise SystemExit(2) from None
        raise


def surviving(stream: TextIO | None, own: TextIO | None, descriptor: int) -> TextIO:
    """The stream with writes that never fail, where it is the process's own; characters it does not know are escaped."""
    if stream is None:  # its descriptor was closed when the process began
        return _wrapped(io.FileIO(descriptor, "w", closefd=False), "utf-8")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if stream is not own or raw is None or isinstance(raw, _Surviving):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return _wrapped(raw, stream.encoding, bool(getattr(stream, "write_through", False)))


def surviving_writer(raw: Any) -> io.BufferedWriter:
    """A buffer over an open raw file whose writes never fail; `stdout_problem` knows their first error."""
    return io.BufferedWriter(_Surviving(raw))


def _wrapped(raw: Any, encoding: str, write_through: bool = False) -> TextIO:
    return io.TextIOWrapper(
        surviving_writer(raw),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
        write_through=write_through,
    )


def stdout_problem() -> str:
    """Why stdout could not be written; empty where it could be, or where nobody reads it."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Surviving) or raw.error is None or raw.reader_left:
        return ""
    return raw.error.strerror or str(raw.error)


def open_descriptors() -> None:
    """Descriptors 0 to 2 that are closed lead nowhere, so that no file that is opened later takes their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
