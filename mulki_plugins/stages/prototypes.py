"""Visual prototypes: the mean image of each class, as a model sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki_plugins.losses import class_sums
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.stages.protocols import Dataset
from mulki_plugins.stages.statistics import Batch, encoded, sum_over


@torch.no_grad()
def visual_prototypes(
    models: Sequence[ClipClassifier], dataset: Dataset, tasks: set[int], *, batch_size: int = 256, num_workers: int = 0,
    after_batch: Callable[[], None] | None = None,
) -> list[dict[int, Tensor]]:  # fmt: skip
    """P_c = unit(Σ z over the images of class c): unit-norm class means over a training set, through the evaluation transform.

    The data set is read once for all models. after_batch: called after each batch; what it raises ends the reading.
    Returns for each model the prototypes [C, d] by task. A class without images gets its text feature as prototype, the
    mean over all templates.
    """
    texts = [{task: model.text_features(task, "all") for task in tasks} for model in models]
    device = texts[0][min(tasks)].device

    def term(batch: Batch) -> dict[str, Tensor]:
        rows = {
            task: (batch.tasks == task).nonzero()[:, 0] for task in tasks
        }  # on the host: no batch waits for the device
        mine = {task: each.to(device, non_blocking=True) for task, each in rows.items()}
        parts = {
            f"count {task}": torch.bincount(batch.host_classes[rows[task]], minlength=len(t))
            for task, t in texts[0].items()
        }
        for m, model in enumerate(models):
            z = encoded(model, batch.images)
            for task, t in texts[m].items():
                parts[f"sum {m} {task}"] = class_sums(z[mine[task]], batch.classes[mine[task]], len(t))
        return parts

    totals = sum_over(dataset, term, device, batch_size=batch_size, workers=num_workers, after_batch=after_batch)

    def prototypes(m: int, task: int, t: Tensor) -> Tensor:
        present = (totals[f"count {task}"] > 0).to(t.device)[:, None]
        return torch.where(present, F.normalize(totals[f"sum {m} {task}"], dim=1), t)

    return [{task: prototypes(m, task, t) for task, t in by_task.items()} for m, by_task in enumerate(texts)]
