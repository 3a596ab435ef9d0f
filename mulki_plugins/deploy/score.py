"""Accuracy of a deployed model on labelled images, with its confidence interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mulki_plugins.deploy.candidates import Candidates
from mulki_plugins.deploy.model import DeployedClip
from mulki_plugins.errors import UnreadableImage
from mulki_plugins.metrics import wilson_interval
from mulki_plugins.streams.task import LabelledImages


@frozen
class Score:
    """The answers on one task's images."""

    task: str
    right: int
    images: int
    left_out: tuple[str, ...] = field(default=(), repr=False)
    """The images that could not be read, by path or index; they do not count."""

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.right / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy, in percent."""
        return wilson_interval(self.right, self.images)


def score(
    model: DeployedClip,
    candidates: Candidates,
    task: str,
    images: LabelledImages,
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int,
    workers: int = 0,
    skip: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Score:
    """Classify the images among the candidates. answers: the right candidates of each label, any of which counts.

    skip: leave out images that cannot be read; otherwise UnreadableImage. advance: called with the size of each batch.
    """
    accepted = torch.zeros(len(answers), len(candidates.names), dtype=torch.bool)
    for label, places in enumerate(answers):
        accepted[label, list(places)] = True
    dataset = _Prepared(images, model.transform, task, skip)
    right, left_out = 0, []
    loader: Any = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=_collate)
    for batch, labels, unreadable in loader:
        if batch is not None:
            choice = model.answer_images(batch, candidates).argmax(1).cpu()
            right += int(accepted[labels, choice].sum())
        left_out += unreadable
        advance(len(labels) + len(unreadable))
    return Score(task, right, len(images) - len(left_out), tuple(left_out))


class _Prepared(Dataset[Any]):
    """Prepared images with their labels; the name of an image in place of one that cannot be read."""

    def __init__(self, images: LabelledImages, transform: Callable[[Any], Tensor], task: str, skip: bool) -> None:
        self.images, self.transform, self.task, self.skip = images, transform, task, skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image, label = self.images[index]
            return self.transform(image), label
        except Exception as error:  # decoders raise anything
            path = getattr(self.images, "path", None)
            name = str(path(index)) if callable(path) else f"{self.task}: image {index}"
            if self.skip:
                return name
            message = error.message if isinstance(error, UnreadableImage) else f"{name} cannot be read: {error}"
            raise UnreadableImage(message, "leave unreadable images out with --skip-unreadable") from error


def _collate(items: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor | None, list[int], list[str]]:
    read = [item for item in items if not isinstance(item, str)]
    unreadable = [item for item in items if isinstance(item, str)]
    batch = torch.stack([image for image, _ in read]) if read else None
    return batch, [label for _, label in read], unreadable
