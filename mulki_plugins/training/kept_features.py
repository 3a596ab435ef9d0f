"""What the head reads of test images, kept from one evaluation to the next while the image tower stays as it is."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.fixed_images import image_tower_is_fixed, image_weights
from mulki_plugins.training.checksums import digest

LIMIT = 2**30
"""Bytes that are kept at most; what is beyond is encoded in each evaluation."""


def checksum_of_pixels(x: Tensor) -> int | None:
    """A checksum of a batch of bytes [B, 3, H, W] on the host, and of its shape; None for a batch of other numbers."""
    if x.dtype is not torch.uint8 or x.device.type != "cpu":
        return None
    return zlib.crc32(x.contiguous().numpy().data, zlib.crc32(repr(tuple(x.shape)).encode()))


@define(eq=False)
class KeptFeatures:
    """Features of batches of test images.

    They are dropped when a weight of the image tower has changed. Nothing is kept while it learns, or if something else than
    its weights may decide about them.
    """

    limit: int = LIMIT
    _tower: str = ""
    """A checksum of the weights that the features are of; empty if nothing is kept."""
    _kept: dict[tuple[Any, ...], tuple[Tensor, torch.device]] = field(factory=dict)
    """On the host, by what identifies a batch, with the device that they are used on."""
    _size: int = 0

    def begin(self, model: ClipClassifier, *, keep: bool) -> None:
        """An evaluation begins. keep: False if a plugin may have a part in what is encoded."""
        tower = ""
        if keep and image_tower_is_fixed(model):
            weights = image_weights(model)
            tower = f"{model.head.reads_pooled} {digest(weights, weights.__getitem__)}"
        if tower != self._tower:
            self._kept.clear()
            self._tower, self._size = tower, 0

    def of(self, batch: tuple[Any, ...], encode: Callable[[], Tensor]) -> Tensor:
        """The features [B, d] of a batch, encoded if they are not known. Whoever gets them may write into them.

        batch: what identifies it; it is not kept if a part of that is None.
        """
        if not self._tower or None in batch:
            return encode()
        if (known := self._kept.get(batch)) is not None:
            kept, device = known
            return kept.to(device, copy=True)
        z = encode()
        if self._size + z.nbytes <= self.limit:
            self._kept[batch] = z.detach().to("cpu", copy=True), z.device
            self._size += z.nbytes
        return z
