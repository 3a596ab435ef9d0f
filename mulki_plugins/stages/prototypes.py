"""Visual prototypes: the mean image of each class, as a model sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mulki_plugins.losses import class_sums
from mulki_plugins.models.classifier import ClipClassifier


def tasks_of(dataset: Any) -> set[int]:
    """The task labels that occur in an Avalanche data set; 0 where it has none."""
    labels = getattr(dataset, "targets_task_labels", None)
    return {0} if labels is None else {int(task) for task in labels.uniques}


@torch.no_grad()
def visual_prototypes(
    models: Sequence[ClipClassifier], dataset: Any, tasks: set[int], *, batch_size: int = 256, num_workers: int = 0,
    after_batch: Callable[[], None] | None = None,
) -> list[dict[int, Tensor]]:  # fmt: skip
    """P: the unit-norm mean of each class's image features over a training set, seen through the evaluation transform.

    dataset: an Avalanche data set with (image, class, task label) or (image, class); it is read once for all models.
    after_batch: called after each batch of it; what it raises ends the reading.
    Returns for each model and each of the tasks [C, d]; a class without an image has the prototype of its text, since
    something must stand in its place.
    """
    texts = [{task: model.text_features(task, "all").float() for task in tasks} for model in models]
    sums = [{task: torch.zeros_like(t) for task, t in each.items()} for each in texts]
    counts = {task: torch.zeros(len(t), dtype=torch.long) for task, t in texts[0].items()}
    for batch in DataLoader(dataset.eval(), batch_size=batch_size, num_workers=num_workers):
        x, y = batch[0], batch[1]
        labels = batch[-1] if len(batch) > 2 else torch.zeros_like(y)
        for i, model in enumerate(models):
            device, dtype = model.scale.device, next(model.clip.visual.parameters()).dtype
            z = model.encode_image(x.to(device, dtype)).float()
            for task in tasks:
                mine = labels == task
                sums[i][task] += class_sums(z[mine.to(device)], y[mine].to(device), len(texts[i][task]))
        for task in tasks:
            counts[task] += torch.bincount(y[labels == task], minlength=len(counts[task]))
        if after_batch is not None:
            after_batch()
    return [
        {
            task: torch.where((counts[task] > 0).to(t.device)[:, None], F.normalize(sums[i][task], dim=1), t)
            for task, t in each.items()
        }
        for i, each in enumerate(texts)
    ]
