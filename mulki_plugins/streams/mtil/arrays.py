"""The two data sets whose images lie in a few files: CIFAR-100 in pickles, MNIST in idx files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mulki_plugins.streams.mtil.contents import Contents, Unreadable
from mulki_plugins.streams.mtil.declaration import Declaration
from mulki_plugins.streams.mtil.images import PixelImages


def cifar100(folder: Path, declared: Declaration) -> Contents:
    """CIFAR100: `train` and `test` are pickles with `data`, uint8 [N, 3072], and `fine_labels`; `meta` names the classes."""
    names = _unpickled(folder / "meta").get("fine_label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Unreadable(f"{folder / 'meta'}: expected a list of texts named 'fine_label_names'")
    into = Contents(classes=names, parts={}, named_in=folder / "meta")
    for part in ("train", "test"):
        path = folder / part
        entry = _unpickled(path)
        pixels, labels = entry.get("data"), entry.get("fine_labels")
        if not (
            isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2 and pixels.shape[1] == 3072
        ):
            raise Unreadable(f"{path}: expected bytes [N, 3072] named 'data'")
        if not (isinstance(labels, list) and len(labels) == len(pixels) and all(type(n) is int for n in labels)):
            raise Unreadable(f"{path}: expected a list of {len(pixels):,} whole numbers named 'fine_labels'")
        into.parts[part] = PixelImages(
            pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1),
            _within(path, np.asarray(labels, dtype=object), len(names)),
        )
    return into


class _Arrays(pickle.Unpickler):
    """A pickle of plain values and arrays of numpy; whatever else it asks for is refused."""

    _FINE = frozenset(
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in ((f"{package}.multiarray", "_reconstruct"), (f"{package}.multiarray", "scalar"))
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._FINE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no copy of CIFAR-100 does")
        return super().find_class(module, name)


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        value = _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise Unreadable(f"{path}: this is no pickle that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{path}: expected a mapping")
    return value


def mnist(folder: Path, declared: Declaration) -> Contents:
    """MNIST: idx files in `raw`; the images are mapped, so that none is read before it is asked for."""
    classes = list(declared.classes)
    into = Contents(classes=classes, parts={}, named_in=folder / "raw")
    for part, name in (("train", "train"), ("test", "t10k")):
        images = _idx(folder / "raw" / f"{name}-images-idx3-ubyte", 3)
        path = folder / "raw" / f"{name}-labels-idx1-ubyte"
        labels = _idx(path, 1)
        if len(images) != len(labels):
            raise Unreadable(f"{path}: expected a label for each of {len(images):,} images, got {len(labels):,}")
        into.parts[part] = PixelImages(images, _within(path, labels, len(classes)))
    return into


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Bytes in the form of their header: two zeros, the type 8, the number of dimensions, and each as four bytes."""
    length = 4 + 4 * dimensions
    try:
        with path.open("rb") as file:
            header = file.read(length)
        size = path.stat().st_size
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error
    if len(header) < length or header[:4] != bytes((0, 0, 8, dimensions)):
        raise Unreadable(f"{path}: this is no idx file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}")
    shape = tuple(np.frombuffer(header, dtype=">i4", offset=4).tolist())
    expected = length + int(np.prod(shape, dtype=object))
    if min(shape) < 0 or size != expected:
        raise Unreadable(f"{path}: expected {expected:,} bytes by its header, got {size:,}")
    if not size - length:
        return np.zeros(shape, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r", offset=length, shape=shape)


def _within(path: Path, labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise Unreadable(f"{path}: expected classes from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)
