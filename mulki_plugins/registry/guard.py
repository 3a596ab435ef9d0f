"""Calls code of other packages so that it harms nothing: no exception and no exit gets out, and no output reaches stdout."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from mulki_plugins.errors import MulkiError, plain


@frozen(kw_only=True)
class Outcome:
    """What a call came to: its value, or why there is none; and the first line of what it printed."""

    value: Any = None
    cause: str = ""
    printed: str = ""


def guarded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call a stranger's function. Only KeyboardInterrupt gets out; the current folder is as it was."""
    value, cause, text = None, "", io.StringIO()
    here = _folder()
    with contextlib.ExitStack() as stack:
        descriptor = stack.enter_context(_descriptor_captured())
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            value = function(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: whatever a stranger raises must not stop the program
            cause = cause_of(error)
    if here and _folder() != here:
        os.chdir(here)
    return Outcome(value=value, cause=cause, printed=_first_line(text.getvalue() or descriptor()))


def cause_of(error: BaseException) -> str:
    """An error on one line: its type, what it says, and the line of the package that it came from."""
    if isinstance(error, MulkiError):
        return plain(error.lines()[0]) if error.lines() else "MulkiError"
    if isinstance(error, SystemExit):
        return f"it ends the program: sys.exit({error.code!r}){_place(error)}"
    try:
        said = _first_line(str(error))
    except Exception:  # an error whose own text fails
        said = ""
    return plain(f"{type(error).__name__}{': ' if said else ''}{said}{_place(error)}")


def _place(error: BaseException) -> str:
    """The file and line of a stranger's code where it was raised, or nothing."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and "importlib" not in frame.filename and frame.filename != __file__
    ]
    if not frames or isinstance(error, SyntaxError):  # which names its place itself
        return ""
    path = Path(frames[-1].filename)
    if path.is_relative_to(Path(__file__).parents[1]):
        return ""
    return f" ({path.parent.name}/{path.name}:{frames[-1].lineno})"


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return plain(lines[0][:200]) if lines else ""


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return ""


@contextlib.contextmanager
def _descriptor_captured() -> Iterator[Callable[[], str]]:
    """Keeps what is written to file descriptor 1 past `sys.stdout`, such as by a child process; yields a reader of it."""
    text = ""
    try:
        saved = os.dup(1)
    except OSError:  # stdout is closed
        yield lambda: ""
        return
    with _sink() as sink:
        _flush()
        os.dup2(sink.fileno(), 1)
        try:
            yield lambda: text
        finally:
            _flush()
            os.dup2(saved, 1)
            os.close(saved)
            with contextlib.suppress(OSError):
                sink.seek(0)
                text = sink.read(4096).decode(errors="replace")


def _sink() -> Any:
    try:
        return tempfile.TemporaryFile()
    except OSError:  # no room for one
        return open(os.devnull, "r+b")


def _flush() -> None:
    for stream in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(Exception):
            stream.flush()  # type: ignore[union-attr]
