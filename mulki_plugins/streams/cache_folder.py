"""The folder of prepared test images: its files, its limit, and room for more. Knows no torch."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError
from mulki_plugins.files import cache_folder, is_locked
from mulki_plugins.streams import pixel_file
from mulki_plugins.streams.pixel_file import SUFFIX, Layout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # checked below

LIMIT = 64 * 2**30
"""Bytes that the files of a cache folder may take. MTIL's 97,209 test images take 14 GiB at 224 x 224."""
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_DRAWN = re.compile(r"mtil-mini-[\w-]+-(train|test)-[0-9a-f]{12}\.npz")
_ABANDONED = 3600
"""Seconds after which a half-made file has no writer any more."""


def size_limit() -> int:
    """Bytes that a cache folder may take: `$MULKI_CACHE_LIMIT`, such as 20GB, else LIMIT. With 0 nothing is cached."""
    text = os.environ.get("MULKI_CACHE_LIMIT", "")
    if not text:
        return LIMIT
    if not (match := _SIZE.fullmatch(text)):
        raise MulkiError(f"MULKI_CACHE_LIMIT: expected a size, got {printable(text)!r}", "write it like 20GB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def pixel_folder() -> Path:
    """The folder of `evaluate.cache: auto`."""
    return cache_folder() / "pixels"


@frozen
class CacheFile:
    """A file of the cache folder."""

    path: Path
    what: str
    """What it holds."""
    images: int | None
    """How many test images it is for; None for other files."""
    stored: int | None
    """How many of them are in it."""
    size: int
    """Bytes on the disk."""
    last_used: float
    """Seconds since 1970."""


def list_cache(folder: Path) -> list[CacheFile]:
    """The files of a cache folder, last used first: prepared test images, and the pictures drawn for mtil-mini."""
    files = []
    for path in [*_pixel_files(folder), *_drawn_pictures(folder)]:
        with contextlib.suppress(OSError):  # removed meanwhile
            files.append(_describe(path))
    return sorted(files, key=lambda file: (-file.last_used, file.path))


def _pixel_files(folder: Path) -> Iterator[Path]:
    """The files that a cache has named; the folder may hold others."""
    return (path for path in folder.glob(f"*-{'[0-9a-z]' * 16}{SUFFIX}") if path.is_file())


def _drawn_pictures(folder: Path) -> Iterator[Path]:
    """The files of the cache's own folder into which mtil-mini draws; no other folder has any."""
    if folder.resolve() != cache_folder().resolve():
        return iter(())
    return (path for path in folder.glob("mtil-mini-*.npz") if _DRAWN.fullmatch(path.name) and path.is_file())


def _describe(path: Path) -> CacheFile:
    status = path.lstat()
    taken = status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
    if path.suffix != SUFFIX:
        what = f"{path.stem.rpartition('-')[0]}: drawn pictures"
        return CacheFile(path, what, None, None, taken, status.st_mtime)
    if (layout := pixel_file.read_layout(path)) is None:
        return CacheFile(path, "damaged", None, None, taken, status.st_mtime)
    stored = pixel_file.count_stored(path, layout)
    return CacheFile(path, layout.what, layout.count, stored, taken, status.st_mtime)


def clear_cache(folder: Path, unused_for: float = 0.0) -> list[CacheFile]:
    """Remove the files that were last used at least so many seconds ago, and abandoned half-made ones; returns the removed.

    A run that uses a removed file goes on, and makes it anew in its next evaluation. OSError if a file cannot be removed.
    """
    now, removed = time.time(), []
    for file in list_cache(folder):
        if now - file.last_used >= unused_for:
            file.path.unlink(missing_ok=True)
            removed.append(file)
    _remove_abandoned(folder)
    return removed


def make_room(folder: Path, needed: int, limit: int, own: dict[Path, Layout]) -> str:
    """Remove the files that were used longest ago until a new one fits; returns why it cannot, or an empty text.

    It fits within the limit and the free space of the disk, part of which stays free. Files of this run (`own`) and of
    other running ones stay. Nothing is removed in vain.
    """
    if needed > limit:
        return f"it would take {format_size(needed)}, more than the limit of {format_size(limit)} (MULKI_CACHE_LIMIT)"
    _remove_abandoned(folder)
    usage = shutil.disk_usage(folder)
    total, growth, others = 0, 0, []
    for path in _pixel_files(folder):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if path in own:
                total += own[path].size
                growth += max(0, own[path].size - status.st_size)
            else:
                total += status.st_size
                others.append((status.st_mtime, path, status.st_size))
    excess = max(total + needed - limit, needed + growth + kept_free(usage.total) - usage.free)
    removable = []
    for _, path, size in sorted(others):
        if excess <= 0:
            break
        if not is_locked(path, even_shared=True):
            removable.append(path)
            excess -= size
    if excess > 0:
        full = total + needed <= limit
        where = f"the disk of {folder} has too little free space" if full else f"{folder} is full (MULKI_CACHE_LIMIT)"
        return f"{where}: {format_size(needed)} are needed"
    for path in removable:
        with contextlib.suppress(OSError):
            path.unlink()
    return ""


def format_size(size: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def kept_free(total: int) -> int:
    """Bytes that the cache leaves free of a disk of this size: a twentieth, at most 10 GiB."""
    return min(10 * 2**30, total // 20)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make room. After two seconds, or without locks, it goes on all the same."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(20):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove the half-made files of processes that were killed."""
    for path in folder.glob(f".*{SUFFIX}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
