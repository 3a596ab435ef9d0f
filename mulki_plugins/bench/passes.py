"""Cuts passes over a task's images short, such as those for prototypes, and estimates how long the rest would take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from attrs import define, field, frozen
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from mulki_plugins.bench.stopwatch import Stopwatch, replaced
from mulki_plugins.ranks.batches import OwnBatches

ENOUGH = 3.0
"""Seconds after which a pass is cut short."""


@frozen(kw_only=True)
class Pass:
    """One pass over images outside the steps of training."""

    images: int
    """In the whole data set."""
    read: int
    """Until it was cut short."""
    seconds: float
    """Until it was cut short, with what was done with the batches."""
    rate: float
    """Seconds per image."""

    @property
    def whole(self) -> float:
        """Seconds that the whole pass takes."""
        return self.seconds + (self.images - self.read) * self.rate


@define
class Passes:
    """The passes so far. Within `watching`, every data loader but that of the training itself is observed.

    A pass in random order takes as many batches as it needs and is never cut short, unless it says how many images it reads.
    """

    watch: Stopwatch
    clock: Callable[[], float] = time.perf_counter
    rows: int | None = None
    """The most images of a batch, on a machine for which a whole one is too much."""
    evaluating: bool = False
    """Whether an evaluation is on, which reads whole test sets."""
    found: list[Pass] = field(factory=list)

    def take(self) -> list[Pass]:
        """The passes since the last call."""
        found, self.found = self.found, []
        return found

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Observe all loaders within the block."""

        def around(iterate: Callable[[DataLoader[Any]], Any]) -> Callable[[DataLoader[Any]], Iterator[Any]]:
            def watched(loader: DataLoader[Any]) -> Iterator[Any]:
                if (
                    self.watch.current == "loading"
                ):  # the training's own, which is counted where it is asked for a batch
                    items: Iterator[Any] = iterate(loader)
                    return items
                return self._read(loader, iterate(loader))

            return watched

        return replaced(DataLoader, "__iter__", around)

    def _read(self, loader: DataLoader[Any], batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of a loader, fewer if they take too long."""
        timed = self.watch.watch_items(batches, "loading")
        sampler, whole = _order_of(loader)
        endless = isinstance(sampler, RandomSampler) and sampler._num_samples is None
        if self.evaluating or endless or whole is None:
            yield from timed
            return
        images = len(sampler) if isinstance(sampler, Sized) else 0
        size = min(whole, self.rows or whole)
        began, first, first_seconds = self.clock(), 0, 0.0
        read, seconds = 0, 0.0
        for batch in timed:
            yield batch if size == whole else [each[:size] for each in batch]
            read, seconds = min(read + size, images), self.clock() - began
            if not first:
                first, first_seconds = read, seconds
            if seconds > ENOUGH and read < images:
                break
        if read:
            rate = (seconds - first_seconds) / (read - first) if read > first else seconds / read
            self.found.append(Pass(images=images, read=read, seconds=seconds, rate=rate))


def _order_of(loader: DataLoader[Any]) -> tuple[Sampler[Any] | Iterable[Any], int | None]:
    """The sampler of a loader's images and the size of its batches; None if these have no fixed size."""
    batches = loader.batch_sampler
    if loader.batch_size is None and isinstance(batches, OwnBatches):
        batches = batches.batches
    if isinstance(batches, BatchSampler):
        return batches.sampler, batches.batch_size
    return loader.sampler, None
