"""Calls code of other packages so that it harms nothing: no exception and no exit gets out, and no output reaches stdout."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from attrs import frozen

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError

_OURS = Path(__file__).parents[1]


@frozen(kw_only=True)
class Outcome:
    """The result of a call: its value, or the error and its cause on one line; and the first line of what it printed."""

    value: Any = None
    cause: str = ""
    printed: str = ""
    error: BaseException | None = None


def guarded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call third-party code. Only the user's own Ctrl-C gets out; the current folder is as it was."""
    value, failure, text = None, None, io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()), _contained() as pressed:
        try:
            value = function(*args, **kwargs)
        except BaseException as error:  # SystemExit too: whatever it raises must not stop the program
            if isinstance(error, KeyboardInterrupt) and pressed:
                raise
            failure = error
    cause = cause_of(failure) if failure is not None else ""
    return Outcome(value=value, cause=cause, printed=_first_line(text.getvalue()), error=failure)


def called(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The value of third-party code; what it prints goes to stderr.

    MulkiError `<what>: <cause>` for whatever it raises but a MulkiError and the user's own Ctrl-C.
    """
    with contextlib.redirect_stdout(sys.stderr), _contained() as pressed:
        try:
            return function(*args, **kwargs)
        except MulkiError:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and pressed:
                raise
            raise MulkiError(f"{what}: {cause_of(error)}") from error


@contextlib.contextmanager
def _contained() -> Iterator[list[int]]:
    """Puts the current folder and SIGINT's handler back; yields a list that is not empty once the user has pressed Ctrl-C.

    Third-party code may raise KeyboardInterrupt itself, which must not end the program.
    """
    pressed: list[int] = []
    here = _folder()
    handler = signal.getsignal(signal.SIGINT)
    replaced = callable(handler) and threading.current_thread() is threading.main_thread()

    def note(number: int, frame: FrameType | None) -> Any:
        pressed.append(number)
        return handler(number, frame)  # type: ignore[operator, misc]

    if replaced:
        signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        if replaced and not (
            pressed and signal.getsignal(signal.SIGINT) is not note
        ):  # the handler may have put another
            signal.signal(signal.SIGINT, handler)
        if here and _folder() != here:
            with contextlib.suppress(OSError):
                os.chdir(here)


def cause_of(error: BaseException, package: str = "") -> str:
    """An error on one line: its type, its text, and the line of code that raised it, in that top-level package if named."""
    if isinstance(error, MulkiError):
        return printable(error.lines()[0]) if error.lines() else "MulkiError"
    place = f" ({where})" if (where := place_of(error, package)) else ""
    if isinstance(error, SystemExit):
        return printable(f"it ends the program: sys.exit({_text(error.code, repr)}){place}")
    said = printable(" ".join(_text(error, str).split())[:500])
    return printable(f"{type(error).__name__}{': ' if said else ''}{said}{place}")


def _text(value: object, render: Callable[[Any], str]) -> str:
    try:
        return render(value)
    except BaseException:  # an error whose own text fails
        return ""


def place_of(error: BaseException, package: str = "") -> str:
    """`folder/file.py:line` where third-party code raised the error, or nothing.

    package: prefer the innermost line of this top-level package, such as before it called a library.
    """
    if isinstance(error, SyntaxError):  # it names its place itself
        return ""
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = [each for each in frames if _root(each[0]) == package]
    others = [each for each in frames if each[0].f_code.co_filename != __file__ and _is_file(each[0])]
    if not (chosen := inside or others):
        return ""
    frame, line = chosen[-1]
    path = Path(frame.f_code.co_filename)
    return "" if path.is_relative_to(_OURS) else f"{path.parent.name}/{path.name}:{line}"


def _root(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_file(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return not name.startswith("<") and "importlib" not in name


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[0][:200]) if lines else ""


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return ""
