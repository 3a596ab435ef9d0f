"""The features of a training step, kept so that no plugin encodes the batch again, and what a plugin may request beside them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from attrs import field, frozen
from torch import Tensor


@frozen(eq=False, slots=False)
class Features:
    """The features of the last training forward, with their graph, so that no plugin encodes the batch again."""

    image: Tensor
    """[B, d], unit norm."""
    text: dict[int, Tensor]
    """[C, d] for each task in the batch, unit norm."""
    task_labels: Sequence[int]
    """[B], on the host."""
    scale: Tensor
    """The factor of the cosines, a scalar."""
    x: Tensor | None = None
    """The images [B, 3, H, W] that the features are of."""
    classes: dict[object, Tensor] = field(factory=dict)
    """[N, d], unit norm, of the classes that a plugin requested, by plugin; see `ClipClassifier.request`."""

    @cached_property
    def rows(self) -> dict[int, Tensor]:
        """The rows of each task's samples in the batch; the host sorts them, so that it need not ask the device."""
        rows = {task: [row for row, label in enumerate(self.task_labels) if label == task] for task in self.text}
        sorted_rows = torch.tensor([row for each in rows.values() for row in each])
        on_device = sorted_rows.to(self.image.device, non_blocking=True)
        return dict(zip(rows, torch.split(on_device, [len(each) for each in rows.values()]), strict=True))


@frozen(eq=False)
class Request:
    """Classes whose sentences a plugin wants in the next training forwards, beside those of the batch."""

    tasks: tuple[int, ...]
    indices: Tensor
    """[N], on the host: among the concatenated classes of the tasks."""
