"""Test images prepared once: an evaluation transform in two halves, and images whose first half is in a cache.

The first half resizes and crops; its result are bytes, which a cache can hold. The second half turns them into normalised
numbers, for a whole batch on its device. Both together give exactly the numbers of the whole transform.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from attrs import field, frozen
from PIL import Image, features
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import normalize, pil_to_tensor

from mulki_plugins.errors import UnreadableImage
from mulki_plugins.streams.cache import CachedPixels, PixelCache
from mulki_plugins.streams.pixel_file import Layout
from mulki_plugins.streams.task import LabelledImages

VERSION = 1
"""Raise it when a change of the decoders in images.py, or of this file, changes a pixel."""

READERS = 6
"""Processes that read prepared images at most: each delivers thousands a second."""
_TORCHVISION, _OPEN_CLIP = "torchvision.transforms.transforms", "open_clip.transform"
_TO_RGB = f"{_OPEN_CLIP}.MaybeConvertMode"
_OF_IMAGES = {
    f"{_TORCHVISION}.Resize", f"{_TORCHVISION}.CenterCrop", f"{_OPEN_CLIP}.ResizeKeepRatio",
    f"{_OPEN_CLIP}.CenterCropOrPad", _TO_RGB,
}  # fmt: skip
"""What may come before the conversion to a tensor: each a function of the image alone."""
_TO_TENSOR = (f"{_TORCHVISION}.ToTensor", f"{_OPEN_CLIP}.MaybeToTensor")
_NORMALISE = f"{_TORCHVISION}.Normalize"
_CODECS = ("jpg", "libjpeg_turbo", "jpg_2000", "webp", "avif", "libtiff", "zlib")


@frozen(eq=False)
class SplitTransform:
    """An evaluation transform in two halves."""

    resize: Callable[[Image.Image], Image.Image]
    shape: tuple[int, int, int]
    """Of a prepared image: 3, height, width."""
    normalisations: tuple[tuple[Sequence[float], Sequence[float]], ...]
    """Means and standard deviations, each of the three channels; usually one pair."""
    description: str
    """All parameters of the first half, for the cache's key."""
    _tables: dict[torch.device, Tensor] = field(factory=dict, init=False, repr=False)

    def to_pixels(self, image: Image.Image) -> Tensor:
        """The first half: an image -> uint8 [3, H, W]."""
        pixels: Tensor = pil_to_tensor(self.resize(image))
        return pixels

    def to_numbers(self, pixels: Tensor) -> Tensor:
        """The second half: uint8 [..., 3, H, W] -> normalised numbers, the same to the last bit on every device.

        A GPU divides by a constant inexactly, so there each byte's number is looked up: one gather from a table that the CPU
        has computed.
        """
        if pixels.device.type == "cpu":
            numbers = pixels.to(torch.get_default_dtype()).div_(255)
            for mean, std in self.normalisations:
                normalize(numbers, mean, std, inplace=True)
            return numbers
        if pixels.device not in self._tables:
            self._tables[pixels.device] = self.table().to(pixels.device)
        channels = torch.arange(3, device=pixels.device)[:, None, None]
        return self._tables[pixels.device][channels, pixels.int()]

    def table(self) -> Tensor:
        """The number of each channel's 256 bytes, [3, 256]."""
        return self.to_numbers(torch.arange(256, dtype=torch.uint8).expand(3, 1, 256))[:, 0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the tables, which are on a device."""
        return SplitTransform, (self.resize, self.shape, self.normalisations, self.description)


def split_transform(transform: Any) -> SplitTransform | None:
    """The halves of a transform of torchvision's and open_clip's parts; None if they would not give exactly its numbers.

    It must be a Compose that resizes to a fixed size, converts to RGB and to a tensor, then normalises.
    """
    if type(transform) is not Compose:
        return None
    steps: list[Any] = list(transform.transforms)
    kinds = [f"{type(step).__module__}.{type(step).__qualname__}" for step in steps]
    at = next((i for i, kind in enumerate(kinds) if kind in _TO_TENSOR), 0)
    if _TO_RGB not in kinds[:at] or set(kinds[:at]) - _OF_IMAGES or set(kinds[at + 1 :]) - {_NORMALISE}:
        return None
    if any(getattr(step, f"random_{what}_prob", 0) for step in steps for what in ("scale", "aspect")):
        return None
    resize = Compose(steps[:at])
    sizes = {resize(Image.new("RGB", size)).size for size in ((64, 48), (31, 97), (301, 200))}
    if len(sizes) > 1:
        return None
    [(width, height)] = sizes
    texts = [f"{kind}({_parameters(step)})" for kind, step in zip(kinds[:at], steps, strict=False)]
    normalisations = tuple((step.mean, step.std) for step in steps[at + 1 :])
    return SplitTransform(resize, (3, height, width), normalisations, ", ".join(texts))


def _parameters(step: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(vars(step).items()) if not k.startswith("_") and k != "training")


class Pixels(Protocol):
    """Where rows of pixels are kept: CachedPixels or MemoryPixels."""

    def count(self) -> int: ...

    def read(self, row: int, signature: int) -> bytearray | str: ...

    def write(self, row: int, signature: int, pixels: bytes) -> None: ...

    def mark_unreadable(self, row: int, signature: int) -> None: ...


def cached_images(
    images: LabelledImages, task: str, split: SplitTransform, cache: PixelCache, *, skip: bool = False
) -> CachedImages | None:
    """A task's test images with the first half of the transform from the cache; None if they cannot be cached.

    They can if they have a method `fingerprint`. Images in files also have `path`; others are kept in memory if they are
    small. skip: images that an earlier evaluation could not read are not tried again.
    """
    fingerprint = getattr(images, "fingerprint", None)
    known = fingerprint() if callable(fingerprint) else None
    if not isinstance(known, str) or not len(images):
        return None
    key = hashlib.sha256("\0".join((known, split.description, str(split.shape), *_versions())).encode()).hexdigest()
    layout = Layout(key=key, what=f"{task}: {len(images):,} test images", count=len(images), shape=split.shape)
    rows: Pixels | None = None if callable(getattr(images, "path", None)) else cache.memory(layout)
    return CachedImages(images, split, rows or cache.file(task, layout), skip=skip)


def _versions() -> list[str]:
    """Whatever may give the same file other pixels."""
    codecs = [f"{name} {features.version(name)}" for name in _CODECS]
    packages = [f"{name} {version(name)}" for name in ("torchvision", "open_clip_torch")]
    return [f"mulki {VERSION}", f"Pillow {PIL.__version__}", *_heif(), *packages, *codecs, platform.machine()]


def _heif() -> list[str]:
    try:
        return [f"pillow-heif {version('pillow-heif')}"]
    except ModuleNotFoundError:
        return []


class CachedImages:
    """A task's test images as Pictures: an image that is in the cache is not opened."""

    def __init__(self, images: LabelledImages, split: SplitTransform, rows: Pixels, *, skip: bool) -> None:
        self.images, self.split, self.rows, self.skip = images, split, rows, skip
        self._labels = np.asarray(images.targets)
        path = getattr(images, "path", None)
        self._path: Callable[[int], str] | None = path if callable(path) else None

    @property
    def targets(self) -> Sequence[int]:
        return self.images.targets

    def __len__(self) -> int:
        return len(self.images)

    def prepare(self) -> None:
        """Call it before an evaluation, and before its workers start."""
        if isinstance(self.rows, CachedPixels):
            self.rows.prepare()

    def useful_workers(self, workers: int) -> int:
        """How many of so many processes an evaluation needs: few if nearly all images are in a file, none if in memory.

        Each evaluation starts new ones for every task, which costs more than they save if they only copy pixels.
        """
        if self.rows.count() < 0.95 * len(self):
            return workers
        return min(workers, READERS if isinstance(self.rows, CachedPixels) else 0)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        signature = self._signature(index)
        known = "empty" if signature is None else self.rows.read(index, signature)
        if isinstance(known, bytearray):
            pixels = torch.frombuffer(known, dtype=torch.uint8).view(self.split.shape)
            return Picture(self, index, pixels=pixels), int(self._labels[index])
        if known == "unreadable" and self.skip and self._path is not None:
            raise UnreadableImage(f"{self._path(index)}: this image cannot be read, as an earlier evaluation found")
        try:
            image, label = self.images[index]
            if hasattr(image, "load"):
                image.load()
        except UnreadableImage as error:
            if signature is not None and _is_for_good(error):
                self.rows.mark_unreadable(index, signature)
            raise
        return Picture(self, index, image=image, signature=signature), label

    def _signature(self, index: int) -> int | None:
        """A hash of a file's size and times: it changes whenever the file is written or replaced. None if it is gone."""
        if self._path is None:
            return 0
        try:
            status = os.stat(self._path(index))
        except (OSError, ValueError):
            return None
        text = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _is_for_good(error: UnreadableImage) -> bool:
    """Whether an image is damaged, rather than out of reach for the moment."""
    cause = error.__cause__
    return not isinstance(cause, MemoryError) and getattr(cause, "errno", None) is None


class Picture:
    """A test image: prepared, or decoded and not prepared yet."""

    __slots__ = ("image", "index", "pixels", "signature", "source")

    def __init__(
        self,
        source: CachedImages,
        index: int,
        *,
        image: Image.Image | None = None,
        pixels: Tensor | None = None,
        signature: int | None = None,
    ) -> None:
        self.source, self.index, self.image, self.pixels, self.signature = source, index, image, pixels, signature

    def prepared(self) -> Tensor:
        """Its pixels, uint8 [3, H, W], kept for the next time."""
        if self.pixels is None:
            assert self.image is not None
            self.pixels = self.source.split.to_pixels(self.image)
            if self.signature is not None:
                self.source.rows.write(self.index, self.signature, self.pixels.numpy().tobytes())
        return self.pixels

    def original(self) -> Any:
        """The image itself."""
        return self.source.images[self.index][0] if self.image is None else self.image


@frozen(eq=False)
class ToPixels:
    """A transform: a Picture -> uint8 [3, H, W]."""

    def __call__(self, picture: Picture) -> Tensor:
        return picture.prepared()


@frozen(eq=False)
class ToNumbers:
    """The evaluation transform: a Picture -> normalised numbers [3, H, W]."""

    split: SplitTransform

    def __call__(self, picture: Picture) -> Tensor:
        return self.split.to_numbers(picture.prepared())


@frozen(eq=False)
class OfOriginal:
    """Another transform, of a Picture's image."""

    transform: Callable[[Any], Any]

    def __call__(self, picture: Picture) -> Any:
        return self.transform(picture.original())
