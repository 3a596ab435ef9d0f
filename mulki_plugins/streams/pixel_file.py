"""A file of prepared images: rows of uint8 pixels, each with a checksum and the signature of the image it was made from.

Rows are written in place, in any order and by any number of processes: whoever prepares an image gives the same bytes. A row
counts only if its checksum fits, so a killed or concurrent writer leaves no wrong pixel, and the file is valid at any time.
Rows are read with `pread`: a memory map would end the process if the file shrank.

    magic, one line of JSON, zeros up to 4096 | an entry (signature, checksum, state) for each row | rows
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from mulki_plugins.files import in_place_of

SUFFIX = ".pixels"
_MAGIC = b"MulKI pixels 1\n"
_HEADER = 4096
_ENTRY = struct.Struct("<QII")
_EMPTY, _STORED, _UNREADABLE = range(3)
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

Row = bytearray | Literal["empty", "damaged", "unreadable"]
"""The pixels of an image, or why there are none: not prepared yet, a checksum that does not fit, an image known as unreadable."""


def _shorten(text: str) -> str:
    return text[:256]  # a header has 4096 bytes, and JSON takes up to 12 for a character


@frozen(kw_only=True)
class Layout:
    """What a file of pixels holds."""

    key: str
    """A hash of all that determines the pixels, except the image files' own state, which each row's signature holds."""
    what: str = field(converter=_shorten, eq=False)
    """For people: `Food: 25,250 test images`."""
    count: int
    shape: tuple[int, int, int]
    """Of one image: channels, height, width."""

    @property
    def row(self) -> int:
        """Bytes of an image."""
        channels, height, width = self.shape
        return channels * height * width

    @property
    def rows_at(self) -> int:
        """Where the first row begins."""
        return _HEADER + self.count * _ENTRY.size

    @property
    def size(self) -> int:
        """Bytes of the file once every row is written."""
        return self.rows_at + self.count * self.row

    def header(self) -> bytes:
        fields = {"key": self.key, "what": self.what, "count": self.count, "shape": self.shape}
        return (_MAGIC + json.dumps(fields).encode() + b"\n").ljust(_HEADER, b"\0")


def read_layout(path: Path) -> Layout | None:
    """What a file says that it holds; None if it is no file of pixels, or its header is damaged."""
    try:
        with open(os.open(path, os.O_RDONLY | _FLAGS), "rb") as file:
            head = file.read(_HEADER)
        fields: dict[str, Any] = json.loads(head.removeprefix(_MAGIC).partition(b"\n")[0])
        channels, height, width = map(int, fields["shape"])
        layout = Layout(
            key=str(fields["key"]),
            what=str(fields["what"]),
            count=int(fields["count"]),
            shape=(channels, height, width),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return layout if head == layout.header() else None


def count_stored(path: Path, layout: Layout) -> int:
    """The number of rows written, whether or not their checksums fit. OSError if the file cannot be read."""
    with open(path, "rb") as file:
        file.seek(_HEADER)
        table = file.read(layout.count * _ENTRY.size)
    whole = len(table) // _ENTRY.size * _ENTRY.size
    return sum(state == _STORED for _, _, state in _ENTRY.iter_unpack(table[:whole]))


def create(path: Path, layout: Layout) -> None:
    """Make a file without rows, unless another process has just made it. OSError if that fails."""
    with in_place_of(path, if_absent=True) as temporary, temporary.open("wb") as file:
        file.write(layout.header())
        file.write(bytes(layout.count * _ENTRY.size))


class PixelFile:
    """Rows of pixels in a file that `create` has made. A process keeps one such file open at a time."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout

    def read(self, row: int, signature: int) -> Row:
        """The pixels made from the image with this signature."""
        try:
            descriptor = _open(self.path)
            entry = bytearray(_ENTRY.size)
            if _read_at(descriptor, entry, _HEADER + row * _ENTRY.size) < len(entry):
                return "damaged"
            of, checksum, state = _ENTRY.unpack(entry)
            if state == _EMPTY or of != signature:
                return "empty"
            if state == _UNREADABLE:
                return "unreadable" if checksum == _checksum(b"", signature) else "damaged"
            pixels = bytearray(self.layout.row)
            read = _read_at(descriptor, pixels, self._at(row))
        except OSError:
            return "empty"
        whole = read == len(pixels) and state == _STORED and checksum == _checksum(pixels, signature)
        return pixels if whole else "damaged"

    def write(self, row: int, signature: int, pixels: bytes) -> None:
        """Store the pixels of an image. OSError if there is no space, or the file cannot be written."""
        _write_at(_open(self.path), pixels, self._at(row))
        self._enter(row, signature, pixels, _STORED)

    def mark_unreadable(self, row: int, signature: int) -> None:
        """Remember that the image with this signature cannot be decoded. OSError if the file cannot be written."""
        self._enter(row, signature, b"", _UNREADABLE)

    def _enter(self, row: int, signature: int, pixels: bytes, state: int) -> None:
        entry = _ENTRY.pack(signature, _checksum(pixels, signature), state)
        _write_at(_open(self.path), entry, _HEADER + row * _ENTRY.size)

    def _at(self, row: int) -> int:
        return self.layout.rows_at + row * self.layout.row


class MemoryPixels:
    """Rows of pixels in memory that forked processes share. A copy that was pickled starts empty."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._states = mmap.mmap(-1, max(1, layout.count))
        self._rows = mmap.mmap(-1, max(1, layout.count * layout.row))

    def __reduce__(self) -> tuple[type[MemoryPixels], tuple[Layout]]:
        return MemoryPixels, (self.layout,)

    def count(self) -> int:
        """The number of rows written."""
        return self._states[:].count(_STORED)

    def read(self, row: int, signature: int) -> Row:
        if self._states[row] != _STORED:
            return "empty"
        return bytearray(self._rows[row * self.layout.row : (row + 1) * self.layout.row])

    def write(self, row: int, signature: int, pixels: bytes) -> None:
        self._rows[row * self.layout.row : (row + 1) * self.layout.row] = pixels
        self._states[row] = _STORED

    def mark_unreadable(self, row: int, signature: int) -> None:
        """Do nothing: pixels in memory can always be read."""


_opened: tuple[Path, int] | None = None
"""The file that this process has open, and its descriptor."""


def _open(path: Path) -> int:
    global _opened
    if _opened is None or _opened[0] != path:
        close()
        try:
            descriptor = os.open(path, os.O_RDWR | _FLAGS)
        except OSError:  # another user's file, or a disk that cannot be written
            descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        _opened = path, descriptor
    return _opened[1]


def close() -> None:
    """Close the file that this process has open: the next access opens what is at its path then."""
    global _opened
    if _opened is not None:
        descriptor, _opened = _opened[1], None
        with suppress(OSError):
            os.close(descriptor)


def _read_at(descriptor: int, buffer: bytearray, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows, where no other process shares the descriptor
    data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    if hasattr(os, "pwrite"):
        written = os.pwrite(descriptor, data, offset)
    else:
        os.lseek(descriptor, offset, os.SEEK_SET)
        written = os.write(descriptor, data)
    if written < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _checksum(pixels: bytes | bytearray, signature: int) -> int:
    return zlib.crc32(pixels, signature & 0xFFFFFFFF)
