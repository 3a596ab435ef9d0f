"""The contents of a data set's folder whatever its layout, and the file formats of its annotations."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray
from PIL import Image

from mulki_plugins.errors import MulkiError
from mulki_plugins.streams.entries import walk
from mulki_plugins.streams.images import FileImages
from mulki_plugins.streams.task import hash_pixels


class Unreadable(MulkiError):
    """A file or folder of a data set that is not as expected; the message begins with its path."""


@frozen(eq=False)
class PixelImages:
    """Images in one file, uint8 [N, H, W] or [N, H, W, 3], and their class indices [M]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    places: NDArray[np.int64] | None = None
    """Rows of `pixels` [M] if these are only some of the images."""

    @property
    def targets(self) -> list[int]:
        labels: list[int] = self.labels.tolist()
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = index if self.places is None else self.places[index]
        return Image.fromarray(np.asarray(self.pixels[row])).convert("RGB"), int(self.labels[index])

    def fingerprint(self) -> str:
        """A hash of all pixels."""
        return hash_pixels(self.pixels, *([] if self.places is None else [self.places]))

    def take(self, indices: NDArray[np.int64]) -> PixelImages:
        """The images at these indices, without copying a pixel."""
        rows = indices if self.places is None else self.places[indices]
        return PixelImages(self.pixels, self.labels[indices], rows)


Images = FileImages | PixelImages


@define(kw_only=True)
class Contents:
    """The classes of a data set in the order of their labels, by its own names, and the images of each part."""

    classes: list[str]
    parts: dict[str, Images]
    """`train` and `test`, or `all` if the data set has no split."""
    named_in: Path
    """The file that names the classes, or the folder of the class folders."""
    damage: list[str] = field(factory=list)
    """Missing and unreadable files, each with its path: the data cannot be used."""
    odd: list[str] = field(factory=list)
    """Differences from the published data set, each with its path: numbers cannot be compared."""

    def add_files(self, part: str, folder: Path, files: Sequence[str], labels: Sequence[int], annotation: Path) -> None:
        """Add a part's images, as its annotation lists them; missing ones are noted as damage."""
        present, folders = list_below(folder)
        known = set(present)
        lost = [file for file in files if file not in known]
        if lost:
            what = "an image that is" if len(lost) == 1 else f"{len(lost):,} images that are"
            example = ", such as this" if len(lost) > 1 else ""
            message = f"{folder / lost[0]}: {annotation.name} names {what} not there{example}"
            deeper = next((name for name in folders if f"{name}/{lost[0]}" in known), "")
            self.damage.append(f"{message}; it is in {folder / deeper}: move the images up" if deeper else message)
        self.parts[part] = FileImages.of(folder, files, labels)

    def note_unknown_folders(self, folder: Path, classes: Iterable[str]) -> None:
        """Note class folders that no annotation names."""
        known = set(classes)
        self.odd += [
            f"{folder / name}: a class folder that no annotation names"
            for name in list_below(folder)[1]
            if name not in known
        ]


def shorten(mistakes: Sequence[str], most: int = 5) -> list[str]:
    """The first of many mistakes of one kind, and the number of the others."""
    more = len(mistakes) - most
    return [*mistakes[:most], *([f"{mistakes[0].partition(': ')[0]}: and {more:,} more like this"] if more > 0 else [])]


def list_below(folder: Path) -> tuple[list[str], list[str]]:
    """The files and the folders below a folder, relative to it, sorted level by level, without system entries."""
    files: list[str] = []
    folders: list[str] = []
    try:
        for path, entry in walk(str(folder)):
            (folders if entry.is_dir() else files).append(path)
    except OSError as error:
        raise Unreadable(f"{error.filename or folder}: {_reason(error)}") from error
    return sorted(files, key=_levels), sorted(folders, key=_levels)


def _levels(path: str) -> list[str]:
    return path.split("/")


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The non-empty lines of a text file, each with its place `path:number`."""
    try:
        text = path.read_text("utf-8-sig")  # some editors write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path}: {_reason(error)}") from error
    return [(f"{path}:{number}", line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path}: {_reason(error)}") from error


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file."""
    from scipy.io import loadmat  # other data sets do without

    try:
        variables: dict[str, Any] = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises almost anything on a damaged file
        raise Unreadable(f"{path}: not a readable MATLAB file: {_reason(error)}") from error
    return variables


def read_mat_vector(path: Path, variable: str) -> NDArray[np.int64]:
    """A vector of whole numbers in a MATLAB file."""
    vector = np.atleast_1d(np.asarray(read_mat(path).get(variable)))
    numeric = vector.ndim == 1 and vector.dtype.kind in "iuf" and bool((np.abs(vector) < 2**53).all())
    if not numeric or (vector != np.floor(vector)).any():
        raise Unreadable(f"{path}: expected a vector of whole numbers named {variable!r}")
    return vector.astype(np.int64)


def read_pickle(path: Path) -> dict[str, Any]:
    """The mapping in a pickle of plain values and numpy arrays; anything else in it is refused, so that no code runs."""
    try:
        value = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises anything
        raise Unreadable(f"{path}: not a readable pickle: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{path}: expected a mapping")
    return value


class _ArrayUnpickler(pickle.Unpickler):
    _ALLOWED = frozenset(
        (f"{package}.multiarray", name)
        for package in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no copy of CIFAR-100 does")
        return super().find_class(module, name)


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of bytes, memory-mapped. Its header: two zeros, the type 8, the number of dimensions, each as four bytes."""
    length = 4 + 4 * dimensions
    try:
        with path.open("rb") as file:
            header = file.read(length)
        size = path.stat().st_size
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error
    if len(header) < length or header[:4] != bytes((0, 0, 8, dimensions)):
        raise Unreadable(f"{path}: not an idx file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}")
    shape = tuple(np.frombuffer(header, dtype=">i4", offset=4).tolist())
    expected = length + int(np.prod(shape, dtype=object))
    if min(shape) < 0 or size != expected:
        raise Unreadable(f"{path}: expected {expected:,} bytes by its header, got {size:,}")
    if not size - length:
        return np.zeros(shape, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r", offset=length, shape=shape)


def check_labels(path: Path, labels: NDArray[Any], classes: int, first: int = 0) -> NDArray[np.int64]:
    """Labels counted from 0. Unreadable unless they count from `first` and are below `first + classes`."""
    if len(labels) and not first <= int(labels.min()) <= int(labels.max()) < first + classes:
        found = f"{labels.min()} to {labels.max()}"
        raise Unreadable(f"{path}: expected classes from {first} to {first + classes - 1}, got {found}")
    return labels.astype(np.int64) - first


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
