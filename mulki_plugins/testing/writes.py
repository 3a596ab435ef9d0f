"""Notes which files a plugin's code writes and which connections it opens, by Python's audit events."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from attrs import define, field

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}
_CONNECTS = {"socket.connect", "socket.getaddrinfo"}
_TEMPORARY = {"tempfile.mkstemp", "tempfile.mkdtemp"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


_NAMELESS = getattr(os, "O_TMPFILE", 1 << 62)
"""Of a temporary file without a name, which is opened by its folder."""


@define
class _Notebook:
    """What has been noted since `watched` began; events are passed over while `modules` is empty."""

    modules: frozenset[str] = frozenset()
    installed: bool = False
    found: list[str] = field(factory=list)
    temporary: list[str] = field(factory=list)


_notes = _Notebook()


@contextlib.contextmanager
def watched(modules: set[str]) -> Iterator[list[str]]:
    """Yields a list that fills with what the code of these modules writes and connects to."""
    if not _notes.installed:  # Python removes no audit hook
        sys.addaudithook(_hear)
        _notes.installed = True
    _notes.found, _notes.temporary, before = [], [], _listed()
    _notes.modules = frozenset(modules)
    found = _notes.found
    try:
        with mock.patch.object(torch, "save", _noted_save(torch.save)):
            yield found
    finally:
        _notes.modules = frozenset()
        found += [f"writes the file {name}" for name in sorted(_listed() - before) if not any(name in f for f in found)]


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _notes.modules:
        return
    if event == "open":
        path, _, flags = arguments
        nameless = isinstance(flags, int) and flags & _NAMELESS == _NAMELESS
        if isinstance(flags, int) and flags & _WRITING and not nameless and isinstance(path, (str, bytes, os.PathLike)):
            _note("writes the file", os.fsdecode(path))
    elif event in _TEMPORARY:
        _notes.temporary.append(os.fsdecode(arguments[0]))
    elif event in _CHANGES and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _note("changes the file or folder", os.fsdecode(arguments[0]))
    elif event in _CONNECTS:
        _note("opens a connection to", str(arguments[1] if event == "socket.connect" else arguments[0]))


def _note(what: str, name: str) -> None:
    if name.startswith(("/dev/", "/proc/")) or any(name.startswith(each) for each in _notes.temporary):
        return
    if _from_own_code():
        _notes.found.append(f"{what} {name}")


def _from_own_code() -> bool:
    """Whether a module of the plugin is on the stack, and no import, which may write compiled files and caches."""
    frame, own = sys._getframe(2), False
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("importlib._bootstrap"):
            return False
        if name.startswith("mulki_plugins.testing.") and name != __name__:  # further out stands whoever called the kit
            break
        own = own or name in _notes.modules
        frame = frame.f_back  # type: ignore[assignment]
    return own


def _noted_save(save: Any) -> Any:
    """torch.save of a path, which writes without Python's `open`."""

    def noted(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(f, (str, os.PathLike)):
            _note("writes the file", os.fspath(f))
        return save(obj, f, *args, **kwargs)

    return noted


def _listed() -> set[str]:
    """The entries of the current folder, but for hidden ones, which tools write beside a test."""
    try:
        return {entry.name for entry in Path.cwd().iterdir() if not entry.name.startswith((".", "__pycache__"))}
    except OSError:
        return set()
