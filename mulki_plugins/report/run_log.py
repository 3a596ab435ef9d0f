"""log.txt: what a run printed and when, and the full traceback of every error in it."""

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
        """Append a text with the time, each of its lines on a line. Returns whether it was written."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return self._append([f"{now}  {line}" for line in text.split("\n")])

    def traceback(self, error: BaseException) -> bool:
        """Append the whole traceback of an error, with its causes. Returns whether it was written."""
        try:
            lines = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
        except Exception:  # an error whose own text fails
            lines = ["".join(traceback.format_tb(error.__traceback__)), type(error).__name__]
        return self.line("the full traceback of the error:") and self._append([f"    {line}" for line in lines])

    def _append(self, lines: list[str]) -> bool:
        text = "".join(printable(line) + "\n" for line in lines)
        try:
            # follows no link; opened anew each time, so that the log may be moved or deleted during the run
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(self.path, flags, 0o666), "w", encoding="utf-8") as file:
                file.write(text)
        except (OSError, ValueError):
            return False
        return True
