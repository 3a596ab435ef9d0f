"""A data set through a frozen model: sums over its images, in the evaluation transform.

`sum_over` is the one loop for what a method wants to know of a training set. On top of it are the moments of each class and
those of the inputs of a layer; a term of your own is a function from a batch to tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from mulki_plugins.losses import class_sums
from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.models.head import Head, Term
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.batches import OwnBatches
from mulki_plugins.stages.protocols import Dataset, Strategy, autocast_of, classifier_of

Totals = dict[str, Tensor]


@frozen(eq=False)
class Batch:
    """Images on the device, with what is known of them on the host too, so that no batch waits for the device."""

    images: Tensor
    """[B, 3, H, W], on the device."""
    classes: Tensor
    """[B], on the device."""
    tasks: Tensor
    """Task labels [B], on the host; 0 if the data set has none."""
    host_classes: Tensor
    """[B], on the host."""


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
    batches_of_loader = iter(loader)
    while True:
        with unobserved():
            batch = next(batches_of_loader, None)
        if batch is None:
            return
        x, y = batch[0], batch[1]
        yield x, y, batch[-1] if len(batch) > 2 else torch.zeros_like(y)


def unobserved() -> AbstractContextManager[Any]:
    """Hide a block from the mode of torch that counts operations, if it says by `hides` that it may be hidden from.

    For many small operations that do not count, each of which would wait for Python: those that prepare each image, or that
    change each weight.
    """
    mode: Any = _get_current_dispatch_mode()
    return _pop_mode_temporarily() if getattr(mode, "hides", False) else nullcontext()


def _on(
    device: torch.device, dataset: Dataset, batch_size: int, *, workers: int, after_batch: Callable[[], None] | None,
    shared: bool,
) -> Iterator[Batch]:  # fmt: skip
    """The batches of a data set on a device, in order. after_batch: called when the caller is done with one."""
    pinned = device.type == "cuda"
    for x, y, tasks in evaluation_batches(dataset, batch_size, workers=workers, pinned=pinned, shared=shared):
        yield Batch(x.to(device, non_blocking=True), y.to(device, non_blocking=True), tasks, y)
        if after_batch is not None:
            after_batch()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode within the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def sum_over(
    dataset: Dataset, term: Callable[[Batch], Mapping[str, Tensor]], device: torch.device, *, batch_size: int = 256,
    workers: int = 0, after_batch: Callable[[], None] | None = None,
) -> Totals:  # fmt: skip
    """Σ over the batches of a data set of what `term` returns for each, by name, in the type and on the device it returns.

    The images pass once, in order, through the evaluation transform. after_batch: called after each batch; what it raises
    ends the reading: a run gives it `strategy.between_batches`, which shows progress and stops at a signal. On several
    ranks each reads its share of the batches, and all get the totals. ValueError if the data set is empty.
    """
    totals: Totals = {}
    for batch in _on(device, dataset, batch_size, workers=workers, after_batch=after_batch, shared=True):
        for name, value in term(batch).items():
            totals[name] = totals[name].add_(value) if name in totals else value.clone()
    collectives.add_up_by_name(totals)
    if not totals:
        raise ValueError("the data set has no images")
    return totals


def encoded(model: ClipClassifier, images: Tensor) -> Tensor:
    """Unit-norm features [B, d] of images, which are cast to the type of the model's weights."""
    return model.encode_image(images.to(_dtype(model)))


def _dtype(model: ClipClassifier) -> torch.dtype:
    dtype: torch.dtype = next(model.clip.visual.parameters()).dtype
    return dtype


@frozen(eq=False)
class TaskImages:
    """The training images of one task through the frozen model, for a head or an adapter to learn from.

    autocast: makes the context of the run's own forwards, so that the features are those of an evaluation.
    """

    model: ClipClassifier
    dataset: Dataset
    task: int
    batch_size: int = 256
    workers: int = 0
    after_batch: Callable[[], None] | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    pooled: bool = False
    """Whether the sums are given the pooled features behind the image features."""

    @classmethod
    def of(cls, strategy: Strategy, dataset: Dataset, task: int, plugin: object, *, workers: int = 0) -> TaskImages:
        """Those of a strategy's task, read as the strategy evaluates: its precision, its batches, its stop signal."""
        return cls(
            classifier_of(strategy, plugin), dataset, task, int(getattr(strategy, "eval_mb_size", 256)), workers,
            getattr(strategy, "between_batches", None), lambda: autocast_of(strategy),
            isinstance(plugin, Head) and plugin.reads_pooled,
        )  # fmt: skip

    @property
    def classes(self) -> int:
        return len(self.model.prompts[self.task].class_names)

    @property
    def text(self) -> Tensor:
        with torch.no_grad():
            return self.model.text_features(self.task, "all")

    def features(self) -> Iterator[Tensor]:
        """Unit-norm features [B, d] of all images in their order, batch after batch, with a routed adapter switched off.

        On several ranks each reads all of them.
        """
        with evaluating(self.model):
            for batch in _on(
                self.model.scale.device, self.dataset, self.batch_size, workers=self.workers, after_batch=self.after_batch,
                shared=False,
            ):  # fmt: skip
                with torch.no_grad(), self.autocast(), self.model.routes.taking(None):
                    z = self.model.encode_directly(batch.images.to(_dtype(self.model)))
                yield z

    def sum(self, term: Term) -> Totals:
        """Σ over all images of what `term` returns for each batch; floating-point tensors in double precision."""

        def of_batch(batch: Batch) -> Totals:
            with self.autocast():
                z = self._encoded(batch.images)
            values = term(z.float(), batch.classes)
            return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}

        with evaluating(self.model):
            return sum_over(
                self.dataset, of_batch, self.model.scale.device, batch_size=self.batch_size, workers=self.workers,
                after_batch=self.after_batch,
            )  # fmt: skip

    def _encoded(self, images: Tensor) -> Tensor:
        if not self.pooled:
            return encoded(self.model, images)
        return self.model.routes.encode(self.model.encode_for_head, images.to(_dtype(self.model)))[0]

    def moments(self) -> ClassMoments:
        """The number, the mean and the second moment of the features of each class."""

        def term(z: Tensor, y: Tensor) -> Totals:
            wide = z.double()
            each = [wide[y == c] for c in range(self.classes)]
            return {
                "counts": torch.bincount(y, minlength=self.classes),
                "sums": class_sums(wide, y, self.classes),
                "squares": torch.stack([rows.T @ rows for rows in each]),
            }

        return ClassMoments(**self.sum(term))


@frozen(eq=False)
class ClassMoments:
    """Sums over the features of each class, which add up over batches, tasks and processes."""

    counts: Tensor
    """[C]"""
    sums: Tensor
    """Σ z [C, d], in double precision."""
    squares: Tensor
    """Σ z zᵀ [C, d, d], in double precision."""

    @property
    def means(self) -> Tensor:
        """Mean features [C, d]; 0 for a class without images."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    @property
    def covariances(self) -> Tensor:
        """Σ (z − mean)(z − mean)ᵀ / (n − 1) [C, d, d]; 0 for a class of fewer than two images."""
        outer = self.counts[:, None, None] * self.means[:, :, None] * self.means[:, None, :]
        return (self.squares - outer) / (self.counts - 1).clamp(min=1)[:, None, None]

    @property
    def shared_covariance(self) -> Tensor:
        """The covariance around the classes' own means, over all of them [d, d]."""
        outer = torch.einsum("c,ci,cj->ij", self.counts.double(), self.means, self.means)
        degrees = max(1, int(self.counts.sum()) - int((self.counts > 0).sum()))
        return (self.squares.sum(0) - outer) / degrees


def layer_moments(
    model: ClipClassifier, dataset: Dataset, layers: Iterable[str], *, batch_size: int = 256, workers: int = 0,
    after_batch: Callable[[], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The second moment Σ x xᵀ / N [in, in] of the inputs of some layers of the image tower, over all images and tokens.

    layers: paths of modules below `model.clip`, such as `visual.transformer.resblocks.0.mlp.c_fc`; their first input must
    end in the feature dimension. That of an attention is what its q, k and v project; torch calls no `out_proj`, whose input
    cannot be seen. In double precision; ValueError for a layer that is not there or that no image reaches.
    """
    modules = dict(model.clip.named_modules())
    wanted = list(layers)
    if unknown := [path for path in wanted if path not in modules]:
        raise ValueError(f"the model has no layer {unknown[0]!r}")
    seen: Totals = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = inputs[0] if inputs else next(iter(named.values()))
            x = first.detach().reshape(-1, first.shape[-1]).double()
            for name, value in ((path, x.T @ x), (f"{path} rows", x.new_tensor(len(x)))):
                seen[name] = value if name not in seen else seen[name] + value

        return note

    def of_batch(batch: Batch) -> Totals:
        seen.clear()
        encoded(model, batch.images)
        return {**seen, "": torch.tensor(len(batch.images))}

    hooks = [modules[path].register_forward_pre_hook(watch(path), with_kwargs=True) for path in wanted]
    try:
        with evaluating(model):
            totals = sum_over(
                dataset, of_batch, model.scale.device, batch_size=batch_size, workers=workers, after_batch=after_batch
            )
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [path for path in wanted if path not in totals]:
        raise ValueError(f"no image reaches the layer {idle[0]!r}")
    return {path: totals[path] / totals[f"{path} rows"] for path in wanted}


def leading_basis(moment: Tensor, share: float) -> Tensor:
    """The fewest orthonormal directions U [d, k] that hold this share of a second moment [d, d]: Σ λ_i ≥ share · tr.

    share: in 0..1. The columns come in the order of their eigenvalues, the largest first.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in 0..1, got {share}")
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    kept = values.cumsum(0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    count = min(int((kept < share - 1e-12).sum()) + 1, len(values)) if share > 0 else 0
    basis: Tensor = vectors[:, :count]
    return basis


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
