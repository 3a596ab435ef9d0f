"""log.txt: what a run said and when, and the full traceback of whatever went wrong in it."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

from mulki_plugins.characters import printable

FILE = "log.txt"


class RunLog:
    """Appends to the log in a run's folder. A log that cannot be written costs the run nothing."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def line(self, text: str) -> bool:
        """Append a text with the time; a line break in it begins a new line. Returns whether it was written."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return self._append([f"{now}  {line}" for line in text.split("\n")])

    def traceback(self, error: BaseException) -> bool:
        """Append an error's whole traceback, with what caused it. Returns whether it was written."""
        try:
            lines = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
        except Exception:  # an error whose own text fails
            lines = ["".join(traceback.format_tb(error.__traceback__)), type(error).__name__]
        return self.line("the full traceback of what went wrong:") and self._append([f"    {line}" for line in lines])

    def _append(self, lines: list[str]) -> bool:
        text = "".join(printable(line) + "\n" for line in lines)
        try:
            # no link is followed, and each call opens the file anew, so that it may be moved or deleted while a run goes on
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(self.path, flags, 0o666), "w", encoding="utf-8") as file:
                file.write(text)
        except (OSError, ValueError):
            return False
        return True


class SilentLog(RunLog):
    """The log of a process that writes none: another one of the same run does."""

    def _append(self, lines: list[str]) -> bool:
        return True
