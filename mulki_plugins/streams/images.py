"""Images in files: the decoder, a data set's image files, and the search for damaged ones."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mulki_plugins.cores import usable_cores
from mulki_plugins.errors import UnreadableImage
from mulki_plugins.streams.entries import register_openers
from mulki_plugins.streams.task import LabelledImages

Opener = Callable[[str], Image.Image]
"""Decodes an image file to RGB; UnreadableImage if it cannot."""


def open_rgb(path: str) -> Image.Image:
    """The image in a file, converted to RGB as torchvision's data sets do: for published numbers.

    UnreadableImage, naming the file, if it is damaged or not an image.
    """
    return _decode(path, lambda image: image.convert("RGB"))


def open_picture(path: str) -> Image.Image:
    """The image in a file as a person sees it, in RGB: upright by its EXIF data, transparent parts white.

    Only the first frame of an animation is read. UnreadableImage, naming the file, if it is damaged or not an image.
    """
    return _decode(path, lambda image: _flatten(_turn_upright(image)))


def _decode(path: str, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    register_openers()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of odd palettes and EXIF data
            with Image.open(path) as image:
                image.load()
                return to_rgb(image)
    except Exception as error:  # decoders raise anything on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "it is not an image that Pillow can read"
        reason = " ".join(reason.split()) or type(error).__name__
        raise UnreadableImage(f"{path}: this image cannot be read: {reason}") from error


_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What makes an image upright, by its orientation in the EXIF data."""
_SAYING_SO = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Where an image holds its orientation, which no longer counts once it is upright."""


def _turn_upright(image: Image.Image) -> Image.Image:
    """The image upright. Pillow's own exif_transpose writes the EXIF data anew, which fails if any other entry is damaged."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _SAYING_SO:
        turned.info.pop(key, None)
    return turned


def _flatten(image: Image.Image) -> Image.Image:
    """In RGB on a white ground; grey of 16 bits is scaled to 8, where Pillow would clip it at 255."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):
        grey = image.convert("I")
        if image.mode == "I" and np.asarray(grey).max() <= 255:  # 32-bit integers that hold bytes
            return grey.convert("L").convert("RGB")
        return grey.point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


@frozen(eq=False)
class FileImages:
    """Image files below a folder and their class indices [N]; an image is decoded when it is asked for."""

    folder: str
    names: NDArray[np.bytes_]
    """[N], relative to the folder, with `/`. One block of bytes, which a data loader's workers share."""
    labels: NDArray[np.int64]
    opener: Opener = open_rgb

    @classmethod
    def of(
        cls, folder: str | Path, files: Sequence[str], labels: Sequence[int], opener: Opener = open_rgb
    ) -> FileImages:
        """From paths relative to the folder."""
        names = np.array([_encode(file) for file in files], dtype=np.bytes_)
        return cls(str(folder), names, np.asarray(labels, dtype=np.int64), opener)

    @property
    def files(self) -> list[str]:
        """Paths relative to the folder."""
        return [os.fsdecode(name) for name in self.names.tolist()]

    @property
    def targets(self) -> list[int]:
        labels: list[int] = self.labels.tolist()
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.opener(self.path(index)), int(self.labels[index])

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def fingerprint(self) -> str | None:
        """The list of files, and how they are decoded; None with another opener, whose code may change."""
        if self.opener not in (open_rgb, open_picture):
            return None
        files = hashlib.sha256(os.fsencode(os.path.abspath(self.folder)))
        for name in self.names:
            files.update(b"\0" + name)
        return f"{self.opener.__name__} {files.hexdigest()}"

    def take(self, indices: NDArray[np.int64]) -> FileImages:
        """The images at these indices."""
        return FileImages(self.folder, self.names[indices], self.labels[indices], self.opener)


def _encode(file: str) -> bytes:
    """As the file system writes it. A lone surrogate, which JSON can hold, names no file but must not raise either."""
    try:
        return os.fsencode(file)
    except UnicodeEncodeError:
        return file.encode("utf-8", "surrogatepass")


_MARKERS = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"), (b"GIF8", b";"))
"""First and last bytes of a JPEG, a PNG and a GIF."""


def find_damaged(parts: Iterable[LabelledImages], *, decode: bool) -> Iterator[str]:
    """A message with its path for each damaged file among the parts that are FileImages.

    decode: decode every file, on all processors. Otherwise only both ends of a file are read, which finds empty and
    truncated files and files of other kinds; a file with an unusual end is decoded, since cameras append data to theirs.
    """
    files = ((part.path(i), part.opener) for part in parts if isinstance(part, FileImages) for i in range(len(part)))
    if not decode:
        yield from filter(None, starmap(_inspect_ends, files))
    elif listed := list(files):
        with ProcessPoolExecutor(usable_cores(), get_context("spawn")) as pool:
            yield from filter(None, pool.map(_try_to_open, *zip(*listed, strict=True), chunksize=64))


def _inspect_ends(path: str, opener: Opener) -> str:
    """A message if the file is damaged, else an empty text."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16))
            tail = file.read()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not size:
        return f"{path}: this image is empty"
    if any(head.startswith(first) and tail.endswith(last) for first, last in _MARKERS):
        return ""
    return _try_to_open(path, opener)


def _try_to_open(path: str, opener: Opener) -> str:
    try:
        opener(path)
    except UnreadableImage as error:
        return error.message
    return ""
