"""Visual prototypes: the mean image of each class, as a model sees it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mulki_plugins.models.classifier import ClipClassifier


@torch.no_grad()
def visual_prototypes(
    model: ClipClassifier, dataset: Any, tasks: set[int], *, batch_size: int = 256, num_workers: int = 0
) -> dict[int, Tensor]:
    """P: the unit-norm mean of each class's image features over a training set, seen through the evaluation transform.

    dataset: an Avalanche data set with (image, class, task label). Returns for each of the tasks [C, d]; a class without
    an image has the prototype of its text, since something must stand in its place.
    """
    device = model.scale.device
    dtype = next(model.clip.visual.parameters()).dtype
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    texts = {task: model.text_features(task).float() for task in tasks}
    for batch in DataLoader(dataset.eval(), batch_size=batch_size, num_workers=num_workers):
        x, y, labels = batch[0].to(device, dtype), batch[1].to(device), batch[-1].to(device)
        z = model.encode_image(x).float()
        for task in tasks:
            mine = labels == task
            c, d = texts[task].shape
            sums[task] = sums.get(task, z.new_zeros((c, d))).index_add(0, y[mine], z[mine])
            counts[task] = counts.get(task, z.new_zeros(c)) + torch.bincount(y[mine], minlength=c)
    return {
        task: torch.where((counts[task] > 0)[:, None], F.normalize(sums[task], dim=1), texts[task])
        for task in tasks
        if task in sums
    }
