"""The images that a command line names: files, folders, patterns, standard input. Imports no torch."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from attrs import frozen
from PIL import Image

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.entries import describe_others, is_image, walk
from mulki_plugins.streams.images import open_picture

STDIN = "-"
_NO_PATHS = frozenset(range(0x20)) - set(b"\t\n\r\0")
"""Control characters, which no list of paths holds and binary files do."""
_HEIF = re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)
"""How a phone's HEIC begins."""


class _StandardInput(io.BytesIO):
    """An image in memory that messages name."""

    def __str__(self) -> str:
        return "standard input"


@frozen
class Input:
    """An image to classify, or what is wrong with it."""

    name: str
    """Its path, or `-` for an image from standard input."""
    content: _StandardInput | None = None
    problem: str = ""

    def open(self) -> Image.Image:
        """The image in RGB, upright, transparent parts white. UnreadableImage if it cannot be decoded."""
        return open_picture(self.name if self.content is None else cast(str, self.content))


def find_images(arguments: Sequence[str], stdin: Callable[[], bytes], note: Callable[[str], None]) -> list[Input]:
    """The images that the arguments name, in their order, those of a folder by path. MulkiError if they name none.

    An argument is a file, a folder with images at any depth, a pattern such as `photos/*.jpg`, or `-`: then `stdin`
    returns either the bytes of one image, or paths, one a line or separated by NUL. note: called about ignored files.
    """
    if arguments.count(STDIN) > 1:
        raise MulkiError("- is given twice: standard input can be read only once")
    found: list[Input] = []
    for argument in arguments:
        if argument == STDIN:
            found += _from_stdin(stdin(), note)
        else:
            found += _at(argument, note)
    if not found:
        raise MulkiError(f"no image in {', '.join(arguments)}", "name image files, or folders with images")
    return found


def _from_stdin(data: bytes, note: Callable[[str], None]) -> Iterator[Input]:
    if not data.strip():
        raise MulkiError("standard input is empty", "it takes paths, one a line, or the bytes of one image")
    if _is_image(data):
        yield Input(STDIN, _StandardInput(data))
        return
    _refuse_other_bytes(data)
    for line in data.split(b"\0") if b"\0" in data else data.splitlines():
        if line.strip():
            yield from _at(os.fsdecode(line), note, patterns=False)


def _refuse_other_bytes(data: bytes) -> None:
    """MulkiError if this is no list of paths: what stands between the zeros of an image can name folders."""
    if not _NO_PATHS.isdisjoint(data):
        hint = "to read HEIC: pip install pillow-heif" if _HEIF.match(data) else "save the image as .jpg or .png"
        raise MulkiError("standard input is neither an image that Pillow reads nor a list of paths", hint)


def _is_image(data: bytes) -> bool:
    from mulki_plugins.streams.entries import register_openers

    register_openers()
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except Exception:  # Pillow raises errors of many kinds
        return False


def _at(text: str, note: Callable[[str], None], *, patterns: bool = True) -> Iterator[Input]:
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        yield from _below(path, note)
    elif os.path.lexists(path) or not patterns or not glob.has_magic(path):
        yield Input(path, problem="" if os.path.exists(path) else "no such file")
    elif matches := sorted(glob.glob(path, recursive=True)):
        for match in matches:
            yield from _at(match, note, patterns=False)
    else:
        yield Input(path, problem="no file matches this pattern")


def _below(folder: str, note: Callable[[str], None]) -> list[Input]:
    """The images below a folder, sorted by path."""
    try:
        files = [path for path, entry in walk(folder) if not entry.is_dir()]
    except OSError as error:
        return [Input(folder, problem=f"cannot be read: {error.strerror or error}")]
    images = sorted(filter(is_image, files))
    if others := [file for file in files if not is_image(file)]:
        note(f"note: {folder}: ignored, since not images: {describe_others(others)}")
    if not images:
        return [Input(folder, problem="no image in this folder")]
    return [Input(os.path.join(folder, file)) for file in images]
