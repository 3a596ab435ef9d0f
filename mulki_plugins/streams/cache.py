"""The prepared test images of a run: where they are kept, and what happens if they cannot be. Knows no torch."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from mulki_plugins.streams import pixel_file
from mulki_plugins.streams.cache_folder import alone, kept_free, make_room, pixel_folder, size_limit
from mulki_plugins.streams.pixel_file import SUFFIX, Layout, MemoryPixels, PixelFile, Row

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # checked below

IN_MEMORY = 2**28
"""Bytes of pixels that a run keeps in memory, for images that come from no files."""
MOST_LOCKED = 128
"""Files that a run marks as in use; each takes a descriptor."""


class PixelCache:
    """The prepared test images of a run: in files of a folder, or in memory for images that come from no files.

    Nothing here ends a run: what cannot be cached is prepared again in each evaluation, and `problems` says so once.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._locks: dict[Path, int] = {}
        self.folder = pixel_folder() if folder is None else folder
        self.limit = size_limit()
        self.own: dict[Path, Layout] = {}
        """The files of this run, which it does not remove to make room for others."""
        self._in_memory = 0
        self._shared = _Shared()
        self._new: list[str] = []
        self._known: set[str] = set()

    def file(self, name: str, layout: Layout) -> CachedPixels:
        """The pixels of images on disk; `name` begins the file's name."""
        safe = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII)[:40]
        return CachedPixels(self, PixelFile(self.folder / f"{safe}-{layout.key[:16]}{SUFFIX}", layout))

    def memory(self, layout: Layout) -> MemoryPixels | None:
        """The pixels of images in memory; None if they would take too much of it."""
        if self._in_memory + layout.count * layout.row > IN_MEMORY:
            return None
        self._in_memory += layout.count * layout.row
        return MemoryPixels(layout)

    def note(self, problem: str) -> None:
        """A line for `problems`, unless it was there before."""
        if problem not in self._known:
            self._known.add(problem)
            self._new.append(problem)

    def problems(self) -> list[str]:
        """What has gone wrong since the last call, in this process and its workers."""
        if damaged := self._shared.take_damaged():
            self._new.append(f"{self.folder}: the pixels of {damaged} images were damaged and were made anew")
        if reason := self._shared.stopped():
            self.note(f"{self.folder}: no more test images are cached: {reason}")
        problems, self._new = self._new, []
        return problems

    def prepare(self, file: PixelFile) -> bool:
        """Make the file if it is missing or damaged, and mark it as in use. False if it cannot be used."""
        pixel_file.close()  # another process may have put another file in its place
        path = file.path
        try:
            if not _is_whole(path, file.layout):
                self.folder.mkdir(parents=True, exist_ok=True)
                with alone(self.folder):
                    if not self._make(file):
                        return False
            self._lock(path)
            with contextlib.suppress(OSError):
                os.utime(path)  # last used now
        except OSError as error:
            self.note(f"{error.filename or path}: test images are not cached: {error.strerror or error}")
            return False
        self.own[path] = file.layout
        return True

    def _make(self, file: PixelFile) -> bool:
        """Make the file, unless another process has just done it. False if there is no room."""
        if _is_whole(file.path, file.layout):
            return True
        if os.path.lexists(file.path):
            self.note(f"{file.path}: this file of the cache is damaged, and is written anew")
            file.path.unlink()
        if problem := make_room(self.folder, file.layout.size, self.limit, self.own):
            self.note(f"{file.layout.what}: not cached: {problem}")
            return False
        pixel_file.create(file.path, file.layout)
        return True

    def _lock(self, path: Path) -> None:
        """Keep other runs from removing a file to make room. Without effect where there are no locks."""
        if (before := self._locks.pop(path, None)) is not None:
            os.close(before)
        if fcntl is None or len(self._locks) >= MOST_LOCKED:
            return
        with contextlib.suppress(OSError):
            self._locks[path] = os.open(path, os.O_RDONLY)
            fcntl.flock(self._locks[path], fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __del__(self) -> None:
        for descriptor in self._locks.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __getstate__(self) -> dict[str, object]:
        """For a worker that is not forked: it reads and writes the files, and the run keeps the locks."""
        return {**self.__dict__, "_locks": {}}

    def writing(self, write: Callable[[], None]) -> None:
        """Write to a file of the cache, unless a write has failed before or the disk is nearly full."""
        if self._shared.stopped():
            return
        try:
            usage = shutil.disk_usage(self.folder)
            if usage.free < kept_free(usage.total):
                self._shared.stop(_FULL)
            else:
                write()
        except FileNotFoundError:  # cleared while the run goes on: the next evaluation makes it anew
            pass
        except OSError as error:
            self._shared.stop(error.errno or _OTHER)

    def count_damaged(self) -> None:
        self._shared.add_damaged()


class CachedPixels:
    """The rows of one file of a cache, with whatever goes wrong left to the cache."""

    def __init__(self, cache: PixelCache, file: PixelFile) -> None:
        self.cache, self.file = cache, file
        self.usable: bool | None = None
        """None until `prepare`."""

    @property
    def layout(self) -> Layout:
        return self.file.layout

    def prepare(self) -> None:
        """Make the file if it is missing or damaged; call it before each evaluation, before workers start."""
        self.usable = self.cache.prepare(self.file)

    def count(self) -> int:
        """The number of images in the file."""
        try:
            return pixel_file.count_stored(self.file.path, self.layout) if self.usable else 0
        except OSError:
            return 0

    def read(self, row: int, signature: int) -> Row:
        if self.usable is None:
            self.prepare()
        if not self.usable:
            return "empty"
        pixels = self.file.read(row, signature)
        if pixels == "damaged":
            self.cache.count_damaged()
        return pixels

    def write(self, row: int, signature: int, pixels: bytes) -> None:
        if self.usable:
            self.cache.writing(lambda: self.file.write(row, signature, pixels))

    def mark_unreadable(self, row: int, signature: int) -> None:
        if self.usable:
            self.cache.writing(lambda: self.file.mark_unreadable(row, signature))


_FULL, _OTHER = 2**16, 2**16 + 1
"""Reasons to stop writing that are no error numbers."""


class _Shared:
    """Two numbers that forked workers share with the run: why writing has stopped, and how many rows were damaged.

    A worker that is not forked has numbers of its own, which nobody reads.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def __reduce__(self) -> tuple[type[_Shared], tuple[()]]:
        return _Shared, ()

    def stop(self, reason: int) -> None:
        struct.pack_into("<I", self._memory, 0, reason)

    def stopped(self) -> str:
        """Why writing has stopped; empty if it has not."""
        (reason,) = struct.unpack_from("<I", self._memory, 0)
        texts = {0: "", _FULL: "the disk is nearly full", _OTHER: "they cannot be written"}
        return texts[reason] if reason in texts else os.strerror(reason)

    def add_damaged(self) -> None:
        struct.pack_into("<I", self._memory, 4, struct.unpack_from("<I", self._memory, 4)[0] + 1)

    def take_damaged(self) -> int:
        (count,) = struct.unpack_from("<I", self._memory, 4)
        struct.pack_into("<I", self._memory, 4, 0)
        return int(count)


def _is_whole(path: Path, layout: Layout) -> bool:
    """Whether the file is there with the right header and room for all entries; each row has a checksum of its own."""
    try:
        return pixel_file.read_layout(path) == layout and layout.rows_at <= path.stat().st_size <= layout.size
    except OSError:
        return False
