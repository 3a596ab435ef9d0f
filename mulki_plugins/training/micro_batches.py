"""The parts in which a batch passes through the model, and the task ids that the host knows of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor

from mulki_plugins.errors import MulkiError
from mulki_plugins.models.classifier import MASKED
from mulki_plugins.ranks import draws
from mulki_plugins.ranks.batches import part_sizes


@frozen(eq=False)
class Labels:
    """The task labels of a batch [B] on the device, and the same numbers on the host, if it had them before."""

    tensor: Tensor | None = None
    numbers: Sequence[int] | None = None

    def of(self, batch: Sequence[Tensor]) -> Sequence[int] | None:
        """The numbers; None if they are unknown, or if a plugin has put another batch in its place."""
        return self.numbers if batch[-1] is self.tensor else None


@frozen(eq=False)
class MicroBatch:
    """A part of a batch; `strategy.mbatch` while it passes through the model."""

    batch: list[Tensor]
    labels: Labels
    share: float
    """Its share of the batch, in 0..1. The gradients of all parts, each times its share, are those of the batch."""
    last: bool
    rows: int
    """Its images, on all ranks."""


@define(eq=False)
class MicroBatches:
    """A batch in parts, and what they left: the outputs, and the sum of their losses, each times its share."""

    batch: list[Tensor]
    labels: Labels
    rows: int = field(factory=draws.rows)
    """Its images, on all ranks."""
    _outputs: list[Tensor] = field(factory=list)
    _losses: list[Tensor] = field(factory=list)

    def split(self, count: int) -> Iterator[MicroBatch]:
        """At most that many parts, of equal size or one more; the batch itself if it is one."""
        size = len(self.batch[0])
        parts = part_sizes(size, count)
        if len(parts) == 1:
            yield MicroBatch(self.batch, self.labels, 1.0, last=True, rows=self.rows)
            return
        known = self.labels.of(self.batch)
        begin = 0
        for number, (own, rows) in enumerate(parts, 1):
            end = begin + own
            pieces = [each[begin:end] for each in self.batch]
            labels = Labels(pieces[-1], None if known is None else known[begin:end])
            yield MicroBatch(pieces, labels, own / size, last=number == len(parts), rows=rows)
            begin = end

    def add(self, part: MicroBatch, output: Tensor, loss: Tensor) -> None:
        """Keep a part's logits [B, C] and its loss, without their graph. MulkiError if a plugin has changed its size."""
        if len(output) != len(part.batch[0]):
            what = f"a plugin put a batch of {len(output)} images in the place of {len(part.batch[0])}, a part of the batch"
            raise MulkiError(what, "set train.accumulate to 1")
        self._outputs.append(output.detach())
        self._losses.append(part.share * loss.detach())

    @property
    def loss(self) -> Tensor:
        """The loss of the batch."""
        return torch.stack(self._losses).sum()

    @property
    def output(self) -> Tensor:
        """The logits of the batch; those of a part with fewer classes are filled up like those of other tasks."""
        width = max(each.shape[1] for each in self._outputs)
        return torch.cat([F.pad(each, (0, width - each.shape[1]), value=MASKED) for each in self._outputs])
