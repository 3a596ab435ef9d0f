"""Visual prototypes: the mean image of each class, as a model sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from mulki_plugins.losses import class_sums
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.batches import OwnBatches
from mulki_plugins.stages.protocols import Dataset


def evaluation_batches(
    dataset: Dataset, batch_size: int = 256, *, workers: int = 0, generator: torch.Generator | None = None,
    most: int | None = None, pinned: bool = False, shared: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Batches of an Avalanche data set through its evaluation transform: images [B, 3, H, W], classes [B], task labels [B].

    In order, or shuffled if there is a generator, then at most `most` images. The task labels are 0 if the data set has none.
    pinned: in memory from which a GPU can copy on its own. shared: on several ranks, only the batches of this one.
    """
    images: Any = dataset.eval()  # Avalanche's data sets are not torch's by type
    count = len(images) if most is None else min(most, len(images))
    shuffled = None if generator is None else RandomSampler(images, num_samples=count, generator=generator)
    batches = BatchSampler(SequentialSampler(images) if shuffled is None else shuffled, batch_size, drop_last=False)
    loader: DataLoader[Any] = DataLoader(
        images, batch_sampler=OwnBatches(batches) if shared else batches, num_workers=workers, generator=generator,
        pin_memory=pinned,
    )  # fmt: skip
    for batch in loader:
        x, y = batch[0], batch[1]
        yield x, y, batch[-1] if len(batch) > 2 else torch.zeros_like(y)


def sampled(dataset: Dataset, images_per_class: int) -> Dataset:
    """At most that many images of each class of each task of an Avalanche data set, drawn with a fixed seed, in their order.

    It reads the labels alone. The mean of n of a class's images of unit norm, which lie σ apart from their mean, is about
    σ/√n away from it.
    """
    images: Any = dataset  # Avalanche's data sets have their labels as attributes
    classes = torch.as_tensor(list(images.targets))
    labels = getattr(images, "targets_task_labels", None)
    tasks = torch.zeros_like(classes) if labels is None else torch.as_tensor(list(labels))
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    chosen = [
        order[(classes[order] == c) & (tasks[order] == task)][:images_per_class]
        for task, c in sorted(set(zip(tasks.tolist(), classes.tolist(), strict=True)))
    ]
    return dataset.subset(torch.cat(chosen).sort().values.tolist())


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
    texts = [{task: model.text_features(task, "all").float() for task in tasks} for model in models]
    sums = [{task: torch.zeros_like(t) for task, t in by_task.items()} for by_task in texts]
    counts = {task: torch.zeros(len(t), dtype=torch.long) for task, t in texts[0].items()}
    device = texts[0][min(tasks)].device
    for x, y, labels in evaluation_batches(
        dataset, batch_size, workers=num_workers, pinned=device.type == "cuda", shared=True
    ):
        mine = {task: (labels == task).nonzero()[:, 0] for task in tasks}  # on the host: no batch waits for the device
        rows = {task: each.to(device, non_blocking=True) for task, each in mine.items()}
        images, classes = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        for model, by_task in zip(models, sums, strict=True):
            z = model.encode_image(images.to(next(model.clip.visual.parameters()).dtype)).float()
            for task, total in by_task.items():
                total += class_sums(z[rows[task]], classes[rows[task]], len(total))
        for task, count in counts.items():
            count += torch.bincount(y[mine[task]], minlength=len(count))
        if after_batch is not None:
            after_batch()
    collectives.add_up(*counts.values(), *(total for by_task in sums for total in by_task.values()))
    return [
        {
            task: torch.where((counts[task] > 0).to(t.device)[:, None], F.normalize(total[task], dim=1), t)
            for task, t in by_task.items()
        }
        for by_task, total in zip(texts, sums, strict=True)
    ]
