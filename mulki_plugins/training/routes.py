"""What a model's routed adapter learns of a task before its training: the features of its images, with the adapter off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mulki_plugins.stages.statistics import evaluation_batches

if TYPE_CHECKING:
    from mulki_plugins.training.strategy import ContinualTemplate


def learn_routes(strategy: ContinualTemplate, tasks: Sequence[int], *, workers: int = 0) -> None:
    """Show the training images of the tasks that begin to the model's routed adapter, if it has one.

    The images pass the evaluation transform and the model in evaluation mode and in the precision of an evaluation.
    """
    model = strategy.model
    adapter = model.routes.adapter
    if adapter is None:
        return
    training = model.training
    model.eval()
    for task in tasks:
        adapter.learn_route(model.clip, task, _features(strategy, task, workers))
    model.train(training)


def _features(strategy: ContinualTemplate, task: int, workers: int) -> Iterator[Tensor]:
    """Unit-norm features [B, d] of a task's training images, batch after batch."""
    model, dataset = strategy.model, strategy.adapted_dataset
    labels: list[Any] = list(dataset.targets_task_labels)
    if any(label != task for label in labels):
        dataset = dataset.subset([i for i, label in enumerate(labels) if label == task])
    dtype = next(model.clip.visual.parameters()).dtype
    pinned = strategy.device.type == "cuda"
    for x, _, _ in evaluation_batches(dataset, strategy.eval_mb_size, workers=workers, pinned=pinned):
        with torch.no_grad(), strategy.autocast(), model.routes.taking(None):
            features = model.encode_directly(x.to(strategy.device, dtype, non_blocking=True))
        yield features
        strategy.between_batches()
