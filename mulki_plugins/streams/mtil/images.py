"""Images of which the labels are known and nothing is opened before one is asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mulki_plugins.errors import UnreadableImage


@frozen(eq=False)
class FileImages:
    """Files below a folder, and their class indices [N]; each is decoded to RGB when it is asked for."""

    folder: str
    files: NDArray[np.bytes_]
    """[N], relative to the folder: bytes in one block, which the workers of a data loader share."""
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, folder: Path, files: Sequence[str], labels: Sequence[int]) -> FileImages:
        encoded = [_encoded(file) for file in files]
        return cls(str(folder), np.array(encoded, dtype=np.bytes_), np.asarray(labels, dtype=np.int64))

    @property
    def targets(self) -> list[int]:
        labels: list[int] = self.labels.tolist()
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, places: NDArray[np.int64]) -> FileImages:
        """Those at some places."""
        return FileImages(self.folder, self.files[places], self.labels[places])

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decoded(self.path(index)), int(self.labels[index])


def _encoded(file: str) -> bytes:
    """As the file system writes it; half a pair of surrogates, which JSON can hold, names no file but is no crash."""
    try:
        return os.fsencode(file)
    except UnicodeEncodeError:
        return file.encode("utf-8", "surrogatepass")


@frozen(eq=False)
class PixelImages:
    """Images that lie in one file, uint8 [N, H, W] or [N, H, W, 3], and their class indices [N]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    places: NDArray[np.int64] | None = None
    """Where among the pixels each image lies, where not all are meant."""

    def chosen(self, places: NDArray[np.int64]) -> PixelImages:
        """Those at some places, of which no pixel is copied."""
        inside = places if self.places is None else self.places[places]
        return PixelImages(self.pixels, self.labels[places], inside)

    @property
    def targets(self) -> list[int]:
        labels: list[int] = self.labels.tolist()
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        place = index if self.places is None else self.places[index]
        return Image.fromarray(np.asarray(self.pixels[place])).convert("RGB"), int(self.labels[index])


def decoded(path: str) -> Image.Image:
    """An image file in RGB, as torchvision's data sets open it. UnreadableImage where it cannot be decoded."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of palettes with transparency, which RGB has none of
            return Image.open(file).convert("RGB")
    except Exception as error:  # decoders raise whatever they please at damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "it is no image, or of a kind that Pillow does not read"
        raise UnreadableImage(
            f"{path}: this image cannot be decoded: {' '.join(reason.split()) or type(error).__name__}"
        ) from error
