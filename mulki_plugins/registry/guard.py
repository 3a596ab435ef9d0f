"""Calls third-party code so that it harms nothing: no exception and no exit escapes, and no output reaches stdout."""

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
    """The result of a call: its value, or the error with its cause on one line; and the first line that it printed."""

    value: Any = None
    cause: str = ""
    printed: str = ""
    error: BaseException | None = None


def try_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call third-party code and report what happened. Only the user's own Ctrl-C escapes."""
    value, failure, output = None, None, io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()), _contained() as interrupts:
        try:
            value = function(*args, **kwargs)
        except BaseException as error:  # SystemExit too: third-party code must not stop the program
            if isinstance(error, KeyboardInterrupt) and interrupts:
                raise
            failure = error
    cause = cause_of(failure) if failure is not None else ""
    return Outcome(value=value, cause=cause, printed=_first_line(output.getvalue()), error=failure)


def guarded_call(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The value of third-party code, whose output goes to stderr.

    MulkiError `<what>: <cause>` for whatever it raises, except a MulkiError and the user's own Ctrl-C.
    """
    with contextlib.redirect_stdout(sys.stderr), _contained() as interrupts:
        try:
            return function(*args, **kwargs)
        except MulkiError:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and interrupts:
                raise
            raise MulkiError(f"{what}: {cause_of(error)}") from error


@contextlib.contextmanager
def _contained() -> Iterator[list[int]]:
    """Restore the current folder and the handler of SIGINT afterwards.

    Yields a list that fills when the user presses Ctrl-C, because third-party code may raise KeyboardInterrupt itself.
    """
    interrupts: list[int] = []
    folder = _current_folder()
    handler = signal.getsignal(signal.SIGINT)
    replaced = callable(handler) and threading.current_thread() is threading.main_thread()

    def note(number: int, frame: FrameType | None) -> Any:
        interrupts.append(number)
        return handler(number, frame) if callable(handler) else None

    if replaced:
        signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        # After a Ctrl-C the handler itself may have installed another one, which then stays.
        if replaced and (not interrupts or signal.getsignal(signal.SIGINT) is note):
            signal.signal(signal.SIGINT, handler)
        if folder and _current_folder() != folder:
            with contextlib.suppress(OSError):
                os.chdir(folder)


def cause_of(error: BaseException, package: str = "") -> str:
    """An error on one line: its type, its text, and the line of code that raised it.

    package: prefer a line of this top-level package.
    """
    if isinstance(error, MulkiError):
        return printable(error.lines()[0]) if error.lines() else "MulkiError"
    place = f" ({line})" if (line := place_of(error, package)) else ""
    if isinstance(error, SystemExit):
        return printable(f"it ends the program: sys.exit({_render(error.code, repr)}){place}")
    text = printable(" ".join(_render(error, str).split())[:500])
    return printable(f"{type(error).__name__}{': ' if text else ''}{text}{place}")


def place_of(error: BaseException, package: str = "") -> str:
    """`folder/file.py:line` of the third-party code that raised the error; empty if it was not third-party code.

    package: prefer the innermost line of this top-level package, such as its call of a library that failed.
    """
    if isinstance(error, SyntaxError):  # its text names the place
        return ""
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = [each for each in frames if str(each[0].f_globals.get("__name__", "")).partition(".")[0] == package]
    others = [each for each in frames if each[0].f_code.co_filename != __file__ and _has_file(each[0])]
    if not (candidates := inside or others):
        return ""
    frame, line = candidates[-1]
    path = Path(frame.f_code.co_filename)
    return "" if path.is_relative_to(_OURS) else f"{path.parent.name}/{path.name}:{line}"


def _has_file(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return not name.startswith("<") and "importlib" not in name


def _render(value: object, render: Callable[[Any], str]) -> str:
    try:
        return render(value)
    except BaseException:  # an error whose own text fails
        return ""


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[0][:200]) if lines else ""


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return ""
