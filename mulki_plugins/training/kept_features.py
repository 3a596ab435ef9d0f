"""What the head reads of test images, kept from one evaluation to the next while the image tower stays as it is."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.fixed_images import learns_nothing_of_images
from mulki_plugins.training.checksums import digest

LIMIT = 2**30
"""Bytes that are kept at most; what is beyond is encoded in each evaluation."""


class KeptFeatures:
    """Features of test images on the host, by their data set and in the order of its batches.

    They are dropped when a weight of the image tower has changed. Nothing is kept while it learns, or if somebody else's code
    takes part in it.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.encoded = 0
        """The number of batches that had to be encoded since the beginning."""
        self._weights = ""
        self._kept: dict[int, list[Tensor]] = defaultdict(list)
        self._images: list[object] = []
        """The data sets in `_kept`, so that no other gets the identity of one of them."""
        self._size = 0
        self._of: list[Tensor] | None = None
        self._batch = 0

    def begin(self, model: ClipClassifier, images: object) -> None:
        """An evaluation of these test images begins, all of them in their order; None if nothing is to be kept of them."""
        self._of, self._batch = None, 0
        if images is None:
            return
        fixed = learns_nothing_of_images(model)
        weights = model.clip.visual.state_dict() if fixed else {}
        if (now := digest(weights, weights.__getitem__) if fixed else "") != self._weights:
            self._weights, self._size = now, 0
            self._kept.clear()
            self._images.clear()
        if fixed:
            self._of = self._kept[id(images)]
            self._images.append(images)

    def known(self, device: torch.device) -> Tensor | None:
        """The features [B, d] of the next batch, or None if they are not known."""
        if self._of is None or self._batch >= len(self._of):
            return None
        return self._of[self._batch].to(device, non_blocking=True)

    def note(self, features: Tensor) -> None:
        """Take the features [B, d] that the head has read of the next batch, which were known or are new."""
        if self._of is None:
            self.encoded += 1
            return
        if self._batch >= len(self._of):
            self.encoded += 1
            if self._batch == len(self._of) and self._size + features.nbytes <= self.limit:
                self._of.append(features.cpu())
                self._size += features.nbytes
        self._batch += 1
