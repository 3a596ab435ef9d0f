"""Explains an error that ended a run: what happened, where, whose code it was, and what to do."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from mulki_plugins.errors import MulkiError, UnreadableImage
from mulki_plugins.failures import explain_failure, explain_machine_failure
from mulki_plugins.recipe.schema import Recipe
from mulki_plugins.registry.catalog import Kind, Part
from mulki_plugins.registry.discovery import catalog
from mulki_plugins.registry.guard import cause_of
from mulki_plugins.training.contents import StackEntry
from mulki_plugins.training.finite import Diverged

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""Errors of the disk itself, whichever file was being written."""

_CALLBACK = re.compile("before_|after_|load_state_dict|state_dict")


def explain(
    error: BaseException,
    plugins: Sequence[StackEntry],
    terms: dict[str, float],
    where: str,
    folder: Path,
    recipe: Recipe,
) -> MulkiError | None:
    """A MulkiError that explains a known failure, or None.

    terms: the last terms of the loss. where: how far the run was, such as "task digits, step 17". folder: the run's.
    """
    if isinstance(error, UnreadableImage):
        stream = catalog().parts.get(("stream", recipe.stream.name))
        of = f" (the {stream})" if stream is not None and not stream.is_ours else ""
        return MulkiError(f"{where}: {error.message}{of}", error.hint)
    if isinstance(error, MulkiError):
        return error
    if isinstance(error, Diverged):
        values = ", ".join(f"{name} {value:g}" for name, value in terms.items() if name != "total")
        return MulkiError(
            f"{where}: the loss is {error} ({values})",
            "try a lower train.optimizer.lr, train.gradient_clip, or another train.precision",
        )
    if _lost_worker(error):
        return MulkiError(
            f"{where}: a loader's worker process ended",
            "it may have been killed for memory: try fewer workers with train.workers, or 0",
        )
    if isinstance(error, OSError) and (error.errno in _DISK or _is_inside(folder, error.filename)):
        file = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room" if full else "the run must be able to write into its folder"
        return MulkiError(f"{where}: {file}{error.strerror}", f"what was written before is still there; {hint}")
    if (failure := explain_machine_failure(error)) is not None:
        return MulkiError(f"{where}: {failure[0]}", failure[1])
    if (blame := blame_part(error, recipe, plugins)) is not None:
        return MulkiError(f"{where}: {blame}")
    if (failure := explain_failure(error)) is not None:
        return MulkiError(f"{where}: {failure[0]}", failure[1])
    return None


def _is_inside(folder: Path, file: object) -> bool:
    return isinstance(file, (str, Path)) and Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder))


def _lost_worker(error: BaseException) -> bool:
    """Whether the pipe to a loader's worker broke. Torch's own errors about it are among the known failures."""
    if not isinstance(error, (ConnectionResetError, BrokenPipeError, EOFError)):
        return False
    return any(
        frame.f_code.co_filename.endswith("dataloader.py") for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def blame_part(error: BaseException, recipe: Recipe, plugins: Sequence[StackEntry] = ()) -> str | None:
    """`the plugin 'x' of good 1.2 in its after_forward failed: KeyError: 'y' (good/stage.py:14)`.

    Names the part of the recipe nearest to the error: a plugin of `plugins` in a callback, or code of another package. None
    if the error passed through neither.
    """
    foreign = [part for part in parts_of(recipe) if not part.is_ours]
    nearest: tuple[Part | None, str] | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if (entry := _entry_called(frame, plugins)) is not None:
            part = catalog().parts.get(("plugin", entry.name))
            nearest = part, f"{part or f'plugin {entry.name!r}'} in its {frame.f_code.co_name}"
            continue
        module = str(frame.f_globals.get("__name__", ""))
        package = module.partition(".")[0]
        if nearest is not None and nearest[0] is not None and nearest[0].package == package:
            continue
        if candidates := [part for part in foreign if part.package == package and _may_be_in(part, module)]:
            exact = [p for p in candidates if isinstance(p.target, str) and p.target.startswith(f"{module}:")]
            part = (exact or candidates)[0]
            nearest = part, str(part)
    if nearest is None:
        return None
    part, who = nearest
    return f"the {who} failed: {cause_of(error, part.package if part is not None and not part.is_ours else '')}"


def _may_be_in(part: Part, module: str) -> bool:
    """Whether a part's code may lie in a module of its package; of a part given as an object, only in the object's own."""
    return isinstance(part.target, str) or getattr(part.target, "__module__", module) == module


def _entry_called(frame: FrameType, plugins: Sequence[StackEntry]) -> StackEntry | None:
    """The plugin whose callback this frame runs."""
    code = frame.f_code
    if not _CALLBACK.match(code.co_name) or not code.co_argcount:
        return None
    owner = frame.f_locals.get(code.co_varnames[0])
    return next((entry for entry in plugins if entry.plugin is owner), None)


def parts_of(recipe: Recipe) -> list[Part]:
    """Every registered part that a recipe names. Models of open_clip are not registered."""
    return [catalog().parts[key] for key in dict.fromkeys(_keys_of(recipe)) if key in catalog().parts]


def _keys_of(recipe: Recipe) -> Iterator[tuple[Kind, str]]:
    yield "stream", recipe.stream.name
    if recipe.reference is not None:
        yield "stream", recipe.reference.name
    yield "model", recipe.model.name
    for entry in recipe.model.options.get("adapters", []):
        yield from (("adapter", name) for name in entry)
    yield from (("head", name) for name in recipe.model.options.get("head", {}))
    yield "optimizer", recipe.train.optimizer.name
    for entry in recipe.strategy.plugins:
        yield "plugin", entry.name
    for name in recipe.evaluate.metrics:
        yield "metric", name
    for name in recipe.loggers:
        yield "logger", name


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Suppress the tracebacks of threads that write curves: their error is raised again when the next value is logged."""
    before = threading.excepthook

    def report(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def undisturbed() -> Iterator[None]:
    """Handle an error without another one: torch's loaders raise one at any moment after a worker has died."""
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
    """torch reports dead workers once per loader, at the next signal, and so would blame whatever runs then."""
    check = getattr(torch._C, "_error_if_any_worker_fails", None)
    if check is None:
        return
    for _ in range(100):
        try:
            check()
        except RuntimeError:
            continue
        return
