"""Images that cannot be read: an error that names the file, or one image less, counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import get_worker_info

from mulki_plugins.characters import printable
from mulki_plugins.errors import MulkiError, UnreadableImage
from mulki_plugins.registry.guard import place_of
from mulki_plugins.streams.task import LabelledImages

LEFT_OUT = -1
"""The class of an evaluation image that could not be read."""

IN_A_ROW = 100
"""So many unreadable images, one after another, are no accident."""


class ReadableImages:
    """A task's images; where one cannot be read the run ends, or, if `skip`, goes on without it.

    In training the next image that can be read takes its place, so that batches keep their size; in evaluation its class is
    LEFT_OUT, and it counts neither as right nor as wrong.
    """

    def __init__(
        self, images: LabelledImages, name: str, *, training: bool, unreadable: Literal["stop", "skip"]
    ) -> None:
        self.images, self.name, self.training, self.unreadable = images, name, training, unreadable
        self._labels = np.asarray(images.targets)
        self._left_out = torch.zeros(len(images), dtype=torch.bool)
        if unreadable == "skip":
            self._left_out.share_memory_()  # type: ignore[no-untyped-call]  # with a loader's workers

    @property
    def targets(self) -> Sequence[int]:
        return self.images.targets

    @property
    def left_out(self) -> list[int] | list[str]:
        """The images that could not be read so far: their files, or, of a stream whose images have no `path`, their places."""
        places: list[int] = self._left_out.nonzero()[:, 0].tolist()
        path = getattr(self.images, "path", None)
        return [printable(str(path(place))) for place in places] if callable(path) else places

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for step in range(min(len(self), IN_A_ROW)):
            try:
                image, label = self.images[(index + step) % len(self)]
                if hasattr(image, "load"):
                    image.load()  # Pillow decodes when it must
                break
            except BaseException as error:  # decoders raise whatever they please; SystemExit would end a worker
                if isinstance(error, KeyboardInterrupt) and get_worker_info() is None:
                    raise
                if self.unreadable == "stop":
                    raise self._error(index, error) from error
                self._left_out[(index + step) % len(self)] = True
                last = error
        else:
            raise self._error(index, last, f"{step + 1} images in a row cannot be read, the last of which: ")
        place = (index + step) % len(self)
        if label != self._labels[place]:
            what = f"comes with class {label}, and its target is {self._labels[place]}"
            kind = "training" if self.training else "test"
            raise MulkiError(f"{self.name}: {kind} image {place} {what}", "the stream must keep both in one order")
        return image, label if self.training or step == 0 else LEFT_OUT

    def _error(self, index: int, error: BaseException, before: str = "") -> UnreadableImage:
        if isinstance(error, MulkiError):
            return UnreadableImage(before + error.message)
        package = type(self.images).__module__.partition(".")[0]
        where = "" if package == "mulki_plugins" else place_of(error, package)
        reason = f"{type(error).__name__}: {error}".replace("\n", " ") + (f" ({where})" if where else "")
        kind = "training" if self.training else "test"
        return UnreadableImage(f"{before}{self.name}: {kind} image {index} cannot be read: {reason}")
