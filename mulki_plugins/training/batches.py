"""Batches: those of one task, counted and in an order that no other random numbers can change, and those of an evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define
from avalanche.benchmarks.utils.data_loader import MultiDatasetDataLoader
from avalanche.training.templates import SupervisedTemplate
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, SequentialSampler

from mulki_plugins.models.classifier import ClipClassifier
from mulki_plugins.ranks import collectives
from mulki_plugins.ranks.batches import OwnBatches, OwnSamples, SeededSamples, note_share, own_part
from mulki_plugins.stages.statistics import unobserved
from mulki_plugins.streams.pixels import CachedImages
from mulki_plugins.training.kept_features import KeptFeatures, checksum_of_pixels
from mulki_plugins.training.rng import random_state, set_random_state


class TaskBatches:
    """The batches of the loader that Avalanche or a plugin has made, drawn from a random stream of their own.

    count: the exact number of batches of each iteration, pass after pass; None for one pass.
    The stream starts at the state of torch, numpy and Python at the first iteration, and advances only while a batch is
    fetched. So the batches depend on that state alone, whatever the training draws between them, and a resumed run can
    `skip` to any of them. The skipped batches are fetched and dropped: only the fetch itself knows what it draws, for an
    augmentation or a worker.

    On several ranks each yields its part of a batch. Avalanche's loaders with workers read no more than that, and each sample
    has a seed of its own. Without workers, or with a loader that a plugin has made in another way, every rank reads all of
    the batch, because the draws for one sample follow those for the one before.
    """

    def __init__(self, loader: Iterable[Any], count: int | None = None) -> None:
        self.loader = loader
        self.count = count
        self._samples = _share_out(loader)
        self._stream: tuple[Any, ...] = ()
        self._skip = 0
        self._then: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.loader) if self.count is None else self.count  # type: ignore[arg-type]  # Avalanche's loaders have a length

    def skip(self, batches: int, then: Callable[[], None]) -> None:
        """Drop the first batches, over as many iterations as they take, then call `then`."""
        self._skip, self._then = batches, then

    def __iter__(self) -> Iterator[Any]:
        if not self._stream:
            self._stream = random_state()
            torch.manual_seed(int(torch.randint(2**62, ())))  # the training continues from another state
        for batch in self._counted():
            size = self._samples.sizes.popleft() if self._samples and self._samples.sizes else 0
            if self._skip == 0:
                if not collectives.several():  # a plugin's loader may yield anything
                    yield batch
                    continue
                note_share(size or len(batch[0]))
                yield batch if size else own_part(batch)
                continue
            self._skip -= 1
            if self._skip == 0 and self._then is not None:
                self._then()

    def _counted(self) -> Iterator[Any]:
        count = 0
        while self.count is None or count < self.count:
            before = count
            for batch in self._one_pass():
                yield batch
                count += 1
                if count == self.count:
                    return
            if self.count is None:
                return
            if count == before:
                raise ValueError("the task has no training images")

    def _one_pass(self) -> Iterator[Any]:
        """One iteration of the loader, with each fetch in the batches' own random stream."""
        with self._own_stream(), unobserved():
            batches = iter(self.loader)
        while True:
            with self._own_stream(), unobserved():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        outside = random_state()
        set_random_state(self._stream)
        try:
            yield
        finally:
            self._stream = random_state()
            set_random_state(outside)


_END = object()


@define
class _Samples:
    """The sizes of the batches that a loader's sampler has given out; empty before its first pass."""

    sampler: OwnSamples | None = None

    @property
    def sizes(self) -> deque[int]:
        return self.sampler.sizes if self.sampler else deque()


def _share_out(loader: Any) -> _Samples | None:
    """Let one of Avalanche's loaders with workers read this rank's samples alone, each with its seed; None for another loader."""
    if not isinstance(loader, MultiDatasetDataLoader) or not loader.loader_kwargs.get("num_workers"):
        return None
    samples = _Samples()
    without = ("batch_size", "shuffle", "sampler", "drop_last")
    settings = {key: value for key, value in loader.loader_kwargs.items() if key not in without}

    def make(datasets: list[Any], batches: Any) -> DataLoader[Any]:
        samples.sampler = OwnSamples(batches)
        return DataLoader(SeededSamples(ConcatDataset(datasets)), batch_sampler=samples.sampler, **settings)

    loader._make_pytorch_loader = make  # without a reference to the loader: it must end its workers when it is dropped
    return samples


class EvaluationBatches(SupervisedTemplate):
    """The part of a strategy that evaluates on prepared test images, if the experience has them.

    Bytes travel to the device and become normalised numbers there, before any plugin sees `mb_x`. While the image tower stays
    as it is, each image is encoded once.
    """

    model: ClipClassifier
    adapted_dataset: Any
    dataloader: Any
    mbatch: Any
    _prepared: CachedImages | None = None
    _evaluated = 0
    """The number of batches of this evaluation's present test set so far."""
    _pixels: int | None = None
    """A checksum of the batch, if it is prepared."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)  # without this, Avalanche copies its template's, which skips JointTraining's
        self.kept_features = KeptFeatures()

    def eval_dataset_adaptation(self, **kwargs: Any) -> None:
        super().eval_dataset_adaptation(**kwargs)
        self._prepared = getattr(getattr(self.experience, "images", None), "cached", None)
        if self._prepared is not None:
            self._prepared.prepare()
            self.adapted_dataset = self.adapted_dataset.with_transforms("pixels")

    def _before_eval_exp(self, **kwargs: Any) -> None:
        self._evaluated = 0
        super()._before_eval_exp(**kwargs)

    @contextmanager
    def encoded_once(self) -> Iterator[None]:
        """Within the block the model evaluates a batch; it takes what its head reads from an earlier evaluation if it can."""
        if not self.is_training:
            batch = int(self.experience.task_label), self._evaluated, self._pixels
            self._evaluated += 1
            self.model.features_from = lambda encode: self.kept_features.of(batch, encode)
        try:
            yield
        finally:
            self.model.features_from = None

    def make_eval_dataloader(self, num_workers: int = 0, **kwargs: Any) -> None:
        if self._prepared is not None:
            num_workers = self._prepared.useful_workers(num_workers)
        super().make_eval_dataloader(num_workers=num_workers, **kwargs)
        if collectives.world() > 1:
            self.dataloader = self._own_batches(num_workers, bool(kwargs.get("persistent_workers")))

    def _own_batches(self, workers: int, persistent: bool) -> DataLoader[Any]:
        """The test images of this rank: each is on one rank, in the batch that it would be in on one process."""
        images: Any = self.adapted_dataset
        batches = BatchSampler(SequentialSampler(images), self.eval_mb_size, drop_last=False)
        return DataLoader(
            images, batch_sampler=OwnBatches(batches), num_workers=workers, collate_fn=images.collate_fn,
            persistent_workers=persistent and workers > 0, pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def _unpack_minibatch(self) -> None:
        prepared = self._prepared is not None and not self.is_training
        self._pixels = checksum_of_pixels(self.mbatch[0]) if prepared else None
        super()._unpack_minibatch()
        if self._prepared is not None and not self.is_training and self.mbatch[0].dtype is torch.uint8:
            self.mbatch[0] = self._prepared.split.to_numbers(self.mbatch[0])
