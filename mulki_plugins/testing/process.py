"""What a plugin must leave alone in the process: settings, random generators, files, connections, file descriptor 1."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from attrs import define, field, frozen
from torch.nn.modules import module as torch_module

from mulki_plugins.training.rng import random_state, set_random_state

GENERATORS = ("random", "numpy.random", "torch")

_BY_PYTEST = "PYTEST_CURRENT_TEST"
"""The environment variable that pytest changes during a test."""


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != _BY_PYTEST}


def _set_environment(value: dict[str, str]) -> None:
    for key in os.environ.keys() - value.keys() - {_BY_PYTEST}:
        del os.environ[key]
    os.environ.update(value)


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return ""


def _set_folder(value: str) -> None:
    if value:
        os.chdir(value)


def _set_handlers(value: tuple[Any, Any]) -> None:
    with contextlib.suppress(ValueError, TypeError):  # outside the main thread, or a handler set in C
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), value, strict=True):
            signal.signal(number, handler)


def _set_cudnn(value: tuple[bool, bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled = value


@frozen
class _Setting:
    """How to read a setting, and how to restore it if that is possible."""

    get: Callable[[], Any]
    restore: Callable[[Any], Any] = lambda value: None


_SETTINGS = {
    "whether gradients are computed": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": _Setting(
        torch.get_default_device,
        lambda value: torch.set_default_device(None if value == torch.device("cpu") else value),
    ),
    "the number of torch's threads": _Setting(torch.get_num_threads, torch.set_num_threads),
    "torch.use_deterministic_algorithms": _Setting(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "torch.backends.cudnn": _Setting(
        lambda: (
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.enabled,
        ),
        _set_cudnn,
    ),
    "torch's precision of matrix products": _Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "torch's anomaly detection": _Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch's autocast": _Setting(
        lambda: torch.is_autocast_enabled("cpu"), lambda value: torch.set_autocast_enabled("cpu", value)
    ),
    "hooks on all modules": _Setting(
        lambda: sum(
            len(getattr(torch_module, name))
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
        )
    ),
    "numpy's handling of floating-point errors": _Setting(np.geterr, lambda value: np.seterr(**value)),
    "the current folder": _Setting(_folder, _set_folder),
    "the environment variables": _Setting(_environment, _set_environment),
    "the handlers of signals": _Setting(
        lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)), _set_handlers
    ),
    "sys.excepthook": _Setting(lambda: sys.excepthook, lambda value: setattr(sys, "excepthook", value)),
    "Python's limit of recursion": _Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "the garbage collector": _Setting(gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
    "the level of the root logger": _Setting(lambda: logging.root.level, logging.root.setLevel),
}
"""Settings of torch and of the process that all code in it shares."""


def settings() -> dict[str, Any]:
    """The value of each shared setting, by its name in messages."""
    return {name: setting.get() for name, setting in _SETTINGS.items()}


def changed_settings(before: dict[str, Any]) -> list[str]:
    """Names of the settings that differ from those before."""
    return [name for name, value in settings().items() if value != before[name]]


@contextlib.contextmanager
def preserved_state() -> Iterator[None]:
    """Restore the settings and the state of the global random generators afterwards."""
    state, before = random_state(), settings()
    try:
        yield
    finally:
        for name in changed_settings(before):
            _SETTINGS[name].restore(before[name])
        set_random_state(state)


def draw() -> None:
    """Advance every global generator, as dropout or an augmentation would."""
    random.random()
    np.random.rand()
    torch.rand((), device="cpu")


def generators() -> tuple[int, ...]:
    """The state of each of GENERATORS as a number."""
    python, arrays, tensors = random_state()
    return hash(python), hash((arrays[1].tobytes(), arrays[2])), hash(tensors.numpy().tobytes())


@contextlib.contextmanager
def another_process(modules: set[str]) -> Iterator[None]:
    """What differs between processes differs here: the clocks of `time`, and `hash` of a string in these modules."""
    with contextlib.ExitStack() as stack:
        for name in ("time", "monotonic", "perf_counter", "process_time"):
            _shift_clock(stack, name, 98765.4321)
            _shift_clock(stack, f"{name}_ns", 98765_432100001)
        for name in modules:
            if "hash" not in vars(sys.modules[name]):
                stack.enter_context(mock.patch.object(sys.modules[name], "hash", _salted_hash, create=True))
        yield


def _shift_clock(stack: contextlib.ExitStack, name: str, by: float) -> None:
    clock = getattr(time, name)

    def shifted() -> Any:
        return clock() + by

    stack.enter_context(mock.patch.object(time, name, shifted))


@functools.wraps(hash)
def _salted_hash(value: Any) -> int:
    return hash(value) ^ 1 if isinstance(value, (str, bytes)) else hash(value)


@contextlib.contextmanager
def descriptor_captured() -> Iterator[Callable[[], str]]:
    """Capture what reaches file descriptor 1 past `sys.stdout`, such as a child process's output; yields its reader."""
    text = ""
    try:
        saved = os.dup(1)
    except OSError:  # stdout is closed
        yield lambda: ""
        return
    with tempfile.TemporaryFile() as sink:
        sys.stdout.flush()
        os.dup2(sink.fileno(), 1)
        try:
            yield lambda: text
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            sink.seek(0)
            text = sink.read(4096).decode(errors="replace")


_CHANGING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}
_CONNECTING = {"socket.connect", "socket.getaddrinfo"}
_TEMPORARY = {"tempfile.mkstemp", "tempfile.mkdtemp"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_UNNAMED = getattr(os, "O_TMPFILE", 1 << 62)
"""The flag of a temporary file without a name, which is opened by its folder."""


@define
class _Audit:
    """What audit events have shown since `audited` began. Events are ignored while `modules` is empty."""

    modules: frozenset[str] = frozenset()
    installed: bool = False
    writes: list[str] = field(factory=list)
    temporary: list[str] = field(factory=list)


_audit = _Audit()


@contextlib.contextmanager
def audited(modules: set[str]) -> Iterator[list[str]]:
    """Yields a list that fills with what the code of these modules writes and connects to."""
    if not _audit.installed:  # Python cannot remove an audit hook
        sys.addaudithook(_handle_event)
        _audit.installed = True
    _audit.writes, _audit.temporary, before = [], [], _entries()
    _audit.modules = frozenset(modules)
    writes = _audit.writes
    try:
        with mock.patch.object(torch, "save", _audited_save(torch.save)):
            yield writes
    finally:
        _audit.modules = frozenset()
        new = sorted(_entries() - before)
        writes += [f"writes the file {name}" for name in new if not any(name in line for line in writes)]


def _handle_event(event: str, arguments: tuple[Any, ...]) -> None:
    if not _audit.modules:
        return
    if event == "open":
        path, _, flags = arguments
        unnamed = isinstance(flags, int) and flags & _UNNAMED == _UNNAMED
        if isinstance(flags, int) and flags & _WRITING and not unnamed and isinstance(path, (str, bytes, os.PathLike)):
            _record("writes the file", os.fsdecode(path))
    elif event in _TEMPORARY:
        _audit.temporary.append(os.fsdecode(arguments[0]))
    elif event in _CHANGING and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _record("changes the file or folder", os.fsdecode(arguments[0]))
    elif event in _CONNECTING:
        _record("opens a connection to", str(arguments[1] if event == "socket.connect" else arguments[0]))


def _record(action: str, name: str) -> None:
    if name.startswith(("/dev/", "/proc/")) or any(name.startswith(folder) for folder in _audit.temporary):
        return
    if _called_by_author():
        _audit.writes.append(f"{action} {name}")


def _called_by_author() -> bool:
    """Whether a module of the plugin is on the stack, and no import, which may write compiled files and caches."""
    frame, by_author = sys._getframe(2), False
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("importlib._bootstrap"):
            return False
        if name.startswith("mulki_plugins.testing.") and name != __name__:  # beyond it is whoever called the kit
            break
        by_author = by_author or name in _audit.modules
        frame = frame.f_back  # type: ignore[assignment]  # typeshed: the first frame is not None, the last one's f_back is
    return by_author


def _audited_save(save: Any) -> Any:
    """torch.save, which writes to a path without Python's `open`."""

    def audited_save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(f, (str, os.PathLike)):
            _record("writes the file", os.fspath(f))
        return save(obj, f, *args, **kwargs)

    return audited_save


def _entries() -> set[str]:
    """The entries of the current folder except hidden ones, which tools write beside a test."""
    try:
        return {entry.name for entry in Path.cwd().iterdir() if not entry.name.startswith((".", "__pycache__"))}
    except OSError:
        return set()
