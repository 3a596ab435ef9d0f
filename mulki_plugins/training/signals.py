"""SIGINT, SIGTERM and SIGHUP: the run stops after the current step, with a checkpoint; a second SIGINT stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mulki_plugins.errors import Stopped
from mulki_plugins.ranks.session import place

__all__ = ["StopRequest", "Stopped"]

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Whether a signal asked the run to stop, and which one."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that this process has received."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; after the first one, SIGINT has the system's own handler, which ends the process at once.

        A signal that was ignored when the process started, as SIGHUP is under nohup, stays ignored.
        Loader workers inherit the handlers, so they survive a signal that is sent to all processes of a job.
        """
        if threading.current_thread() is not threading.main_thread():  # others cannot handle signals
            yield
            return
        process, several = os.getpid(), place() is not None
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

        def note(number: int, frame: FrameType | None) -> None:
            self.number = number
            if several:  # torchrun sends its ranks the signal that they have received from the terminal once more
                return
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.getpid() == process:
                shown = b"\x1b[?25h" if os.isatty(2) else b""  # the progress bar hides the cursor
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, shown + b"\nstopping after this step; Ctrl-C again stops at once\n")

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
