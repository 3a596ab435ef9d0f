"""What can go wrong while a run trains, as an error that says what happened, where, and what to do."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from avalanche.logging import BaseLogger

from mulki_plugins.errors import MulkiError, UnreadableImage
from mulki_plugins.known import known_failure, machine_failure
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.training.blame import blamed
from mulki_plugins.training.snapshot import Named
from mulki_plugins.training.template import Diverged

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""Whatever the file is, it is the disk that takes no more."""


class LastTerms(BaseLogger):
    """The terms of the loss as they were last logged."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        if name.startswith("train/loss/"):
            self.values[name.removeprefix("train/loss/")] = float(value)


def explained(
    error: BaseException, plugins: Sequence[Named], terms: LastTerms, place: str, folder: Path, recipe: Recipe
) -> MulkiError | None:
    """The error in a user's words, or None where it is none that one can know.

    place: where the run was, such as "task digits, step 17". folder: the run's.
    """
    if isinstance(error, UnreadableImage):
        stream = catalog().parts.get(("stream", recipe.stream.name))
        of = f" (the {stream})" if stream is not None and not stream.is_ours else ""
        return MulkiError(f"{place}: {error.message}{of}", error.hint)
    if isinstance(error, MulkiError):
        return error
    if isinstance(error, Diverged):
        said = ", ".join(f"{name} {value:g}" for name, value in terms.values.items() if name != "total")
        return MulkiError(
            f"{place}: the loss is {error} ({said})",
            "try a lower train.optimizer.lr, train.gradient_clip, or another train.precision",
        )
    if _worker_died(error):
        return MulkiError(
            f"{place}: a loader's worker process ended",
            "it may have been killed for memory: fewer with train.workers, or 0",
        )
    if isinstance(error, OSError) and (error.errno in _DISK or _inside(folder, error.filename)):
        file = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room" if full else "the run must be able to write into its folder"
        return MulkiError(f"{place}: {file}{error.strerror}", f"what was written before is still there; {hint}")
    if (known := machine_failure(error)) is not None:
        return MulkiError(f"{place}: {known[0]}", known[1])
    if (fault := blamed(error, recipe, plugins)) is not None:
        return MulkiError(f"{place}: {fault}")
    if (known := known_failure(error)) is not None:
        return MulkiError(f"{place}: {known[0]}", known[1])
    return None


def _inside(folder: Path, file: object) -> bool:
    return isinstance(file, (str, Path)) and Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder))


def _worker_died(error: BaseException) -> bool:
    """Whether the pipe to a loader's worker broke; torch's own words for its death are known failures."""
    return isinstance(error, (ConnectionResetError, BrokenPipeError, EOFError)) and _raised_in(error, "dataloader.py")


def _raised_in(error: BaseException, file: str) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(file):
            return True
        trace = trace.tb_next
    return False


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Without the tracebacks of the threads that write curves: their error is raised again where the next value is logged."""
    before = threading.excepthook

    def noted(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = noted
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def undisturbed() -> Iterator[None]:
    """While an error is dealt with: torch's loaders raise another at any moment when a worker of theirs has died."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        _forget_dead_workers()
        signal.signal(signal.SIGCHLD, before)


def _forget_dead_workers() -> None:
    """torch reports dead workers once for each loader, at the next signal: it would blame whatever runs then."""
    check = getattr(torch._C, "_error_if_any_worker_fails", None)
    if check is None:
        return
    for _ in range(100):
        try:
            check()
        except RuntimeError:
            continue
        return
